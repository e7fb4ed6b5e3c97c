"""A folder of fetched files, bounded over all processes of a machine, that survives whatever kills them.

    DIGEST-name.tar         a whole file: renamed to this name when it was complete
    draft-DIGEST-name.tar   a file on its way, trusted by nobody; as long as it will be
    room.lock               held while room is made

Names hold a digest of the whole address: sets whose shards have the same names share a cache. Whoever writes a draft holds an exclusive
lock on it, whoever uses a file a shared one, and both end with their process; what nobody holds goes when its room is needed, the least
recently used first. That order is of file times, so a clock that jumps makes the wrong file go, which is then fetched again. Nothing is
synced to the disk: after a power cut a file may hold other bytes, which the digests of the set notice when it is next opened.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from fasttrain.data.remote.retry import PassingError
from fasttrain.errors import UserError

_DRAFT = "draft-"
_LOCK = "room.lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FILE_NAME = 80  # characters of a file's own name that are kept in the cache's


class NoRoomError(PassingError):
    """The cache is full of what is in use, or its disk is full: it may pass when somebody lets go."""

    becomes = UserError
    remedy = "raise data.cache_gib where its disk has room, or name another disk with data.cache"


class Held:
    """A file of the cache in use here: it stays until `release`."""

    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def current(self) -> bool:
        """Whether the file still stands at its path."""
        return _same_file(self._descriptor, self.path)

    def release(self) -> None:
        """Lets the file go when room is needed."""
        os.close(self._descriptor)


class Cache:
    """The files of any number of sets; `folder` is made where it is missing, `bound` is in bytes.

    Raises:
        UserError: the folder cannot be made or written to, or cannot lock files.
    """

    def __init__(self, folder: Path, bound: int):
        self.folder = folder
        self.bound = bound
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.alone():
                self._sweep()
        except OSError as error:
            told = f"data.cache {folder}: {error.strerror}; name a folder on a local disk that can be written and locked"
            raise UserError(told) from None

    def place(self, url: str) -> Path:
        """Where a whole file of this address stands, if it does."""
        name = url.partition("?")[0].rstrip("/").rpartition("/")[2]
        kept = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-_FILE_NAME:]
        return self.folder / f"{xxhash.xxh3_128_hexdigest(url.encode())}-{kept}"

    def hold(self, url: str) -> Held | None:
        """The whole file of this address, held, and marked as used now; None where there is none."""
        path = self.place(url)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            # Exclusive locks on a whole file last for the moment in which it comes or goes.
            if _lock(descriptor, path, fcntl.LOCK_SH):
                with suppress(PermissionError):  # another user's file keeps the time of its making
                    os.utime(descriptor)
                return Held(path, descriptor)

    def has(self, url: str) -> bool:
        """Whether there is a whole file of this address."""
        return self.place(url).exists()

    def draft(self, url: str) -> "Draft | None":
        """A draft of the file of this address, this process's alone; None while another has it."""
        place = self.place(url)
        path = place.with_name(_DRAFT + place.name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        return Draft(self, path, place, descriptor) if _lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB) else None

    def drop(self, held: Held) -> None:
        """Removes a file whose content is wrong, unless another process has put a new one there already; lets it go in any case."""
        with self.alone():
            if held.current():
                held.path.unlink()
        held.release()

    def make_room(self, descriptor: int, size: int) -> None:
        """Lets a draft become `size` bytes long, and removes what nobody holds until that fits.

        Raises:
            UserError: the file is larger than the whole cache.
            NoRoomError: what is in use leaves too little.
        """
        if size > self.bound:
            raise UserError(f"data.cache_gib: a file of {_told(size)} does not fit into {_told(self.bound)}; raise data.cache_gib")
        with self.alone():
            used = sum(about.st_size for _, about in self._files()) - os.fstat(descriptor).st_size
            for path, about in self._evictable():
                if used + size <= self.bound:
                    break
                used -= about.st_size if _remove(path) else 0
            if used + size > self.bound:
                raise NoRoomError(f"{_told(used)} of the cache's {_told(self.bound)} are in use, and {_told(size)} more are wanted")
            os.truncate(descriptor, size)

    def remove_one(self) -> bool:
        """Removes the least recently used file that nobody holds; returns whether there was one."""
        with self.alone():
            return any(_remove(path) for path, _ in self._evictable())

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # others drop files while we look
                yield path, path.stat(follow_symlinks=False)

    def _evictable(self) -> list[tuple[Path, os.stat_result]]:
        """The whole files, the least recently used first."""
        whole = [(path, about) for path, about in self._files() if not path.name.startswith((_DRAFT, _LOCK))]
        return sorted(whole, key=lambda entry: entry[1].st_mtime_ns)

    def _sweep(self) -> None:
        """Removes the drafts of processes that are gone."""
        for path in self.folder.glob(f"{_DRAFT}*"):
            _remove(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process makes room or puts a file in its place."""
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Draft:
    """A file on its way into the cache, locked: make room, write, then `keep`; `discard` in any case."""

    def __init__(self, cache: Cache, path: Path, place: Path, descriptor: int):
        self._cache = cache
        self._path = path
        self._place = place
        self._descriptor = descriptor
        self._kept = False
        os.truncate(descriptor, 0)

    def make_room(self, size: int) -> None:
        """See `Cache.make_room`."""
        self._cache.make_room(self._descriptor, size)

    def write(self, offset: int, content: bytes) -> None:
        """Writes all of `content`.

        Raises:
            NoRoomError: the disk is full of what is not ours to remove.
        """
        rest = memoryview(content)
        while rest:
            try:
                count = os.pwrite(self._descriptor, rest, offset)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not self._cache.remove_one():
                    raise NoRoomError(f"the disk of {self._cache.folder} is full") from None
                continue
            rest, offset = rest[count:], offset + count

    def keep(self, size: int) -> None:
        """Puts the file, now whole and `size` bytes long, in its place."""
        os.truncate(self._descriptor, size)
        with self._cache.alone():
            os.rename(self._path, self._place)
        self._kept = True

    def discard(self) -> None:
        """Lets go, and removes the draft if it was not kept."""
        if not self._kept:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _lock(descriptor: int, path: Path, kind: int) -> bool:
    """Locks a file that was just opened, if nobody is in the way (LOCK_NB) and it still stands at its path; closes it otherwise."""
    try:
        fcntl.flock(descriptor, kind)
        if _same_file(descriptor, path):
            return True
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return False


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _remove(path: Path) -> bool:
    """Removes a file if nobody holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EISDIR):
            return False
        raise
    if not _lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return False
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return True


def _told(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
