"""One file from a store to a draft: continued where it broke off, and whole by the size that the store gave."""

from contextlib import closing

from fasttrain.data.remote.cache import Draft
from fasttrain.data.remote.openers import Opener, Stream
from fasttrain.data.remote.retry import PassingError, Patience

CHUNK = 1 << 20
_GUESS = 1 << 24  # bytes to make room for at a time, where the store does not tell the size


class Fetch:
    """The download of one file.

    Args:
        opener, url: where it comes from.
        draft: an empty one, written from its start.
        patience: how long failures are borne.
    """

    def __init__(self, opener: Opener, url: str, draft: Draft, patience: Patience):
        self._opener = opener
        self._url = url
        self._draft = draft
        self._patience = patience
        self._version: str | None = None
        self._done = 0
        self._most = 0  # bytes that any try has reached

    def run(self) -> int:
        """Writes the whole file and returns its size in bytes.

        Raises:
            FileNotFoundError: the store has no such file.
            UserError: the store refuses, or the store or the cache's disk failed for too long.
        """
        while True:
            try:
                with closing(self._opener.open(self._url, self._done, self._version)) as stream:
                    return self._copy(stream)
            except PassingError as failure:
                self._patience.wait(failure)

    def _copy(self, stream: Stream) -> int:
        self._done, self._version = stream.start, stream.version
        room = max(stream.size or 0, stream.start)
        self._draft.make_room(room)
        while content := stream.read(CHUNK):
            if self._done + len(content) > room:
                room = self._done + _GUESS
                self._draft.make_room(room)
            self._draft.write(self._done, content)
            self._advance(len(content))
        if stream.size is not None and self._done != stream.size:
            raise PassingError(f"the transfer ended after {self._done} of {stream.size} bytes")
        return self._done

    def _advance(self, count: int) -> None:
        self._done += count
        if self._done > self._most:
            self._most = self._done
            self._patience.progress()
