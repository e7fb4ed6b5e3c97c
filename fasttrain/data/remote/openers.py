"""What reads a store: one opener a scheme, all giving a stream from an offset on."""

from collections.abc import Callable
from typing import Protocol

from fasttrain.data.remote.addresses import PIPE, shown
from fasttrain.errors import UserError


class Stream(Protocol):
    """The content of one file of a store, from `start` on.

    Attributes:
        start: the first byte given; 0 where the store could not go on from the offset that was asked for.
        size: bytes of the whole file, where the store says so.
        version: what names this version of the file, where the store has such a thing (an ETag).
    """

    start: int
    size: int | None
    version: str | None

    def read(self, most: int) -> bytes:
        """The next bytes, at most so many; none at the end. Raises PassingError."""
        ...

    def close(self) -> None:
        """Gives back connections and processes."""
        ...


class Opener(Protocol):
    """Opens files of a store."""

    def open(self, url: str, offset: int, version: str | None) -> Stream:
        """A stream from `offset` on, if the file still is `version`; else from its start.

        Raises:
            FileNotFoundError: the store says that there is no such file.
            UserError: the store refuses, and would again.
            PassingError: anything that may be gone at the next try.
        """
        ...


def _http() -> Opener:
    from fasttrain.data.remote.http import HttpOpener

    return HttpOpener()


def _objects() -> Opener:
    from fasttrain.data.remote.objects import ObjectOpener

    return ObjectOpener()


def _pipe() -> Opener:
    from fasttrain.data.remote.pipes import PipeOpener

    return PipeOpener()


# A closed list: some of fsspec's other schemes evaluate templates or open further addresses that a config should not reach.
OPENERS: dict[str, Callable[[], Opener]] = {
    **dict.fromkeys(("http", "https"), _http),
    **dict.fromkeys(
        ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "adl", "oss", "oci", "sftp", "ssh", "ftp", "hdfs", "webhdfs", "memory"),
        _objects,
    ),
    PIPE: _pipe,
}


def opener_of(scheme: str, place: str, allow_pipe: bool) -> Opener:
    """The opener of a scheme.

    Raises:
        UserError: an unknown scheme, or `pipe:` where the config does not allow it.
    """
    if scheme not in OPENERS or "::" in place:
        raise UserError(f"data.train: {shown(place)}: cannot be opened; the schemes are {', '.join(OPENERS)}, one to an address")
    if scheme == PIPE and not allow_pipe:
        raise UserError("data.train: pipe: runs a command of the config in a shell; set data.allow_pipe: true if you trust the config")
    return OPENERS[scheme]()
