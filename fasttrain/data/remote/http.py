"""Files of web servers: ranges, sizes, timeouts, redirects that stay on the web, and logins from ~/.netrc alone."""

import http.client
import netrc
import os
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from fasttrain.data.remote.addresses import shown
from fasttrain.data.remote.retry import PassingError
from fasttrain.errors import UserError

TIMEOUT = 30.0  # seconds, of every operation on a socket
LONGEST_ASKED = 300.0  # seconds that a server may ask to be left alone
_GONE = (404, 410)
_REFUSED = (401, 403, 407)
_ELSEWHERE = range(300, 400)
_BUSY = (408, 425, 429)
_BAD_RANGE = 416


class HttpOpener:
    """Opens http: and https: addresses; each open is one request."""

    def __init__(self) -> None:
        self._director = _director()

    def open(self, url: str, offset: int, version: str | None) -> "HttpStream":
        """See `Opener.open`."""
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "fasttrain"})
        _log_in(request)
        if offset and version:
            request.add_header("Range", f"bytes={offset}-")
            request.add_header("If-Range", version)
        try:
            return HttpStream(self._director.open(request, timeout=TIMEOUT), offset)
        except urllib.error.HTTPError as error:
            with error:
                raise _judged(url, error) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(f"{shown(url)}: the server's certificate does not verify ({error.reason.verify_message})") from None
            raise PassingError(f"no connection ({error.reason})") from None
        except (OSError, http.client.HTTPException) as error:
            raise PassingError(f"no answer ({_told(error)})") from None


class HttpStream:
    """The body of one answer. See `Stream`."""

    def __init__(self, answer: http.client.HTTPResponse, offset: int):
        self._answer = answer
        headers = answer.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            answer.close()
            raise UserError(f"the server compresses its answers ({headers['Content-Encoding']}) though it was asked not to")
        length = headers.get("Content-Length", "")
        body = int(length) if length.isdecimal() else None
        self.start = offset if answer.status == http.client.PARTIAL_CONTENT else 0
        self.size = None if body is None else self.start + body
        self.version = _version(headers)
        if self.start and not headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            answer.close()
            raise PassingError("the server answered with another range than was asked for")

    def read(self, most: int) -> bytes:
        try:
            return self._answer.read1(most)  # what is here already: a break loses nothing of it
        except (OSError, http.client.HTTPException) as error:
            raise PassingError(f"the connection broke ({_told(error)})") from None

    def close(self) -> None:
        self._answer.close()


class _StayOnTheWeb(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other web servers (urllib itself refuses other schemes), never out of https, and takes no login along."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str) -> Any:
        if req.type == "https" and urlsplit(newurl).scheme.lower() != "https":
            raise UserError(f"{shown(req.full_url)}: the server sends on from https: to an address that is not, which is refused")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            _log_in(request)
        return request


def _director() -> urllib.request.OpenerDirector:
    """urllib with nothing but the web: its default also opens file: and ftp: addresses."""
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        _StayOnTheWeb,
        urllib.request.HTTPErrorProcessor,
    ):
        director.add_handler(handler())
    return director


def _log_in(request: urllib.request.Request) -> None:
    """Adds the login that ~/.netrc (or $NETRC) has for the request's host, if any; redirects do not carry it on."""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    host = urlsplit(request.full_url).hostname
    if host is None or not path.is_file():
        return
    try:
        found = netrc.netrc(path).authenticators(host)
    except (netrc.NetrcParseError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); mend it, or remove it") from None
    if found is not None:
        user, _, password = found
        request.add_unredirected_header("Authorization", "Basic " + b64encode(f"{user}:{password}".encode()).decode())


def _judged(url: str, error: urllib.error.HTTPError) -> Exception:
    """What a refusal means: gone, refused for good, or worth another try."""
    # Not its own reason, which may hold an address with a signature.
    told = f"the server answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()
    if error.code in _GONE:
        return FileNotFoundError(f"{shown(url)}: {told}")
    if error.code in _REFUSED:
        return UserError(f"{shown(url)}: {told}; give ~/.netrc a login for this host, or mend the address")
    if error.code in _BUSY or error.code >= 500 or error.code == _BAD_RANGE:
        asked = error.headers.get("Retry-After", "")
        return PassingError(told, min(float(asked), LONGEST_ASKED) if asked.isdecimal() else None)
    if error.code in _ELSEWHERE:
        return UserError(f"{shown(url)}: {told}: it sends on to an address that is not on the web, or around in circles")
    return UserError(f"{shown(url)}: {told}")


def _version(headers: http.client.HTTPMessage) -> str | None:
    """A strong ETag, or the date of the last change: what If-Range takes."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__
