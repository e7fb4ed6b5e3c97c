"""Files of object stores and other services, through fsspec; logins are those of the store's own client."""

from typing import IO, Any

import fsspec

from fasttrain.data.remote.addresses import scheme_of, shown
from fasttrain.data.remote.retry import PassingError
from fasttrain.errors import UserError

_BLOCK = 1 << 24  # bytes a request


class ObjectOpener:
    """Opens whatever fsspec has a client for."""

    def open(self, url: str, offset: int, version: str | None) -> "ObjectStream":
        """See `Opener.open`."""
        try:
            system, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UserError(f"{shown(url)}: the client of {scheme_of(url)}: is not installed: {error}") from None
        try:
            about = system.info(path)
            same = version is not None and _version(about) == version
            file = system.open(path, "rb", block_size=_BLOCK)
            if same:
                file.seek(offset)
            return ObjectStream(file, offset if same else 0, about)
        except FileNotFoundError:
            raise FileNotFoundError(f"{shown(url)}: the store has no such file") from None
        except PermissionError as error:
            raise UserError(f"{shown(url)}: the store refuses ({_told(error)}); give its client a login in the environment") from None
        except Exception as error:  # each client has its own errors
            raise PassingError(f"the store fails ({_told(error)})") from None


class ObjectStream:
    """A file that fsspec opened. See `Stream`."""

    def __init__(self, file: IO[bytes], start: int, about: dict[str, Any]):
        self._file = file
        self.start = start
        self.size: int | None = about.get("size")
        self.version = _version(about)

    def read(self, most: int) -> bytes:
        try:
            return self._file.read(most)
        except Exception as error:  # each client has its own errors
            raise PassingError(f"the store breaks off ({_told(error)})") from None

    def close(self) -> None:
        self._file.close()


def _version(about: dict[str, Any]) -> str | None:
    """What names a version in a store's listing, where it has such a thing."""
    keys = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created")
    found = {key: str(about[key]) for key in keys if about.get(key)}
    return repr(found) if found else None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
