"""Where a set's files are: in a folder here, or in a store from which `data.remote` fetches them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class ShardFiles(Protocol):
    """The files of one set, by name. Any number of threads may ask at once."""

    @property
    def place(self) -> str:
        """The folder or URL, as a message names it: without user, password or query."""
        ...

    @property
    def most_held(self) -> int | None:
        """Bytes of files that one process may hold at a time, between `path` and `release`, if there is a bound. One file it always may."""
        ...

    def path(self, name: str) -> Path:
        """A whole local file of this name, fetched first where that is needed. It stays until `release`.

        Raises:
            FileNotFoundError: the folder or store has no such file.
            UserError: a passing failure lasted longer than `data.retry_seconds`, or the cache cannot hold the file.
        """
        ...

    def ahead(self, names: Sequence[str]) -> None:
        """Says which files are wanted next, most urgent first; returns at once. What was said before and is not begun is dropped."""
        ...

    def release(self, name: str) -> None:
        """Says that no mapping of this file is open here any more, so that a cache may drop it."""
        ...

    def renew(self, name: str) -> bool:
        """Says that this file's content is not what it should be; returns whether `path` will now give another copy.

        A copy in a cache is fetched anew, a few times; where that gives the same, the store's own file is damaged.
        """
        ...

    def close(self) -> None:
        """Ends what fetches ahead and gives back what is held."""
        ...


class LocalFiles:
    """The files of a folder on this machine."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def place(self) -> str:
        return str(self.folder)

    @property
    def most_held(self) -> None:
        return None

    def path(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return path

    def ahead(self, names: Sequence[str]) -> None:
        """Files that are here need no fetching."""

    def release(self, name: str) -> None:
        """Files that are here are in no cache."""

    def renew(self, name: str) -> bool:
        return False

    def close(self) -> None:
        """Nothing is held."""
