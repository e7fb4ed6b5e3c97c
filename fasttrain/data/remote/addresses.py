"""Where a set is, as a config names it: a folder here, or an address in a store. Addresses never carry secrets.

A config is written to `RUN/config.yaml`, and a command line is seen by everyone on the machine. So an address with a password or a
signature in it is refused, and no message shows a user, a password or the values of a query, also not of an address that a store sent.
"""

import re
from urllib.parse import parse_qsl, urlsplit

PIPE = "pipe"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):")
_SECRET_WORDS = re.compile(r"token|secret|passw|pwd|signature|^sig$|credential|auth|key", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/?#\s'\"@]*@")
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]+")
_ADDRESS = re.compile(r"\w+://[^\s'\"]+")
_COMMAND_SECRET = re.compile(
    r"(?<![$\w{])(authorization|bearer|token|passw\w*|secret)[\s:=]+(bearer\s+|basic\s+)?+[^\s$'\"]",
    re.IGNORECASE,
)
_REMEDY = "keep secrets in ~/.netrc or in the environment that the store's client reads: a config is copied into the run folder"


def scheme_of(place: str) -> str | None:
    """The scheme of an address in a store, in lower case; None for a path on this machine."""
    found = _SCHEME.match(place)
    return (found[1] or found[2]).lower() if found else None


def join(base: str, name: str) -> str:
    """The address of a file in a set; a query of the base stays behind it."""
    if scheme_of(base) == PIPE:
        return base + name
    path, mark, query = base.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def shown(text: str) -> str:
    """A text with addresses in it as it may be printed: without users, passwords and queries."""
    return _QUERY.sub(r"\1?...", _LOGIN.sub("", text))


def refuse_secrets(place: str) -> None:
    """Refuses an address that carries a secret.

    Raises:
        ValueError: with the remedy, and without the secret.
    """
    scheme = scheme_of(place)
    if scheme is None:
        return
    secret = _secret_of_command(place) if scheme == PIPE else _secret_of(place)
    if secret:
        told = "the command after pipe:" if scheme == PIPE else shown(place)
        raise ValueError(f"{told} carries {secret}; {_REMEDY}")


def _secret_of_command(command: str) -> str | None:
    """What kind of secret a command carries; names of variables (`$TOKEN`) are none."""
    found = next(filter(None, map(_secret_of, _ADDRESS.findall(command))), None)
    return found or ("a secret" if _COMMAND_SECRET.search(command) else None)


def _secret_of(url: str) -> str | None:
    """What kind of secret a URL carries."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    # sftp://me@host and abfs://container@account name no secret; https://TOKEN@host does.
    if at and (":" in login or parts.scheme.lower() in ("http", "https")):
        return "a login"
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    return next((f"a secret in its query ({name})" for name in names if _SECRET_WORDS.search(name)), None)
