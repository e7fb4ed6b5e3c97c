"""All shards of a set indexed once: by the threads of all processes that share a cache folder, which take shards from each other's hands.

    CACHE/indexes/DIGEST OF THE PLACE AND NAMES/000000.npz ...     a part a shard; see parts.py
                                                names.json         the shards, where a folder was listed for them

Each shard is taken under a lock that ends with its holder, so a killed process leaves nothing undone and nothing half done: who comes
next goes on where it stopped. The index is made at first use and is the set from then on: what changes in the shards later is damage,
and an error of `fasttrain prepare` (see unchanged.py).
"""

import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from fasttrain.data.arrays import retried
from fasttrain.data.files import LocalFiles, ShardFiles
from fasttrain.data.foreign.parts import Part, make_part, read_part, write_part
from fasttrain.data.foreign.pattern import Pattern
from fasttrain.data.remote.addresses import scheme_of
from fasttrain.errors import UserError
from fasttrain.files import write_whole

_LOG = logging.getLogger(__name__)
_POLL = 0.1
_LINE_SECONDS = 10.0
_MOST_THREADS = 8
_FETCHED_AHEAD = 16


def index_folder(cache: Path, pattern: Pattern) -> Path:
    """Where the index of a set is kept."""
    base = pattern.base if scheme_of(pattern.base) else str(Path(pattern.base).resolve())
    names = pattern.names if pattern.listed is None else [pattern.listed]
    return cache / "indexes" / xxhash.xxh3_128_hexdigest("\0".join([base, *names]).encode())


def first_listing(pattern: Pattern, folder: Path) -> Pattern:
    """The pattern with the names of its first use: a shard that is gone since is damage, and one that came is told and left out."""
    if pattern.listed is None:
        return pattern
    path = folder / "names.json"
    try:
        if not path.exists():
            write_whole(path, json.dumps(pattern.names))
        names = tuple(map(str, json.loads(path.read_bytes())))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be kept or read ({error}); make room, delete {folder}, or set data.cache") from None
    if new := sorted(set(pattern.names) - set(names)):
        told = "%s: %d shards there are not used (%s ...): they came after the set was indexed; to begin a new set with them, delete %s"
        _LOG.warning(told, pattern.base, len(new), new[0], folder)
    return pattern._replace(names=names)


def index_shards(files: ShardFiles, pattern: Pattern, folder: Path, retry_seconds: float, alive: Callable[[], None]) -> list[Part | None]:
    """The part of every shard, made where it is missing; None for a shard that the folder or store does not have.

    Args:
        files: where the shards are.
        pattern: their names.
        folder: from `index_folder`.
        retry_seconds: how long a passing failure is tried again.
        alive: called now and then while this goes on.

    Raises:
        UserError: a passing failure lasted too long, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _Indexing(files, pattern, folder, retry_seconds).run(alive)
    except OSError as error:
        raise UserError(f"{folder}: cannot keep the index there ({error.strerror}); make room, or set data.cache") from None


class _Indexing:
    """One process's share in the work, and its wait for the others'."""

    def __init__(self, files: ShardFiles, pattern: Pattern, folder: Path, retry_seconds: float):
        self._files, self._names, self._folder, self._retry_seconds = files, pattern.names, folder, retry_seconds
        self._parts: dict[int, Part | None] = {}

    def run(self, alive: Callable[[], None]) -> list[Part | None]:
        for number in range(len(self._names)):
            if (part := read_part(self._path(number))) is not None:
                self._parts[number] = part
        if len(self._parts) < len(self._names):
            self._make(alive)
        return [self._parts[number] for number in range(len(self._names))]

    def _make(self, alive: Callable[[], None]) -> None:
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="fasttrain-index") as pool:
            stop = threading.Event()
            work = [pool.submit(self._work, stop) for _ in range(pool._max_workers)]
            try:
                self._wait(lambda: all(each.done() for each in work), alive)
            finally:
                stop.set()
            for each in work:
                each.result()

    def _wait(self, done: Callable[[], bool], alive: Callable[[], None]) -> None:
        """Tells the progress while the threads work."""
        said = time.monotonic()
        while not done():
            alive()
            time.sleep(_POLL)
            if time.monotonic() - said > _LINE_SECONDS:
                said = time.monotonic()
                told = f"indexing {self._files.place}: {len(self._parts)} of {len(self._names)} shards"
                print(told, file=sys.stderr, flush=True)

    def _work(self, stop: threading.Event) -> None:
        """Takes shard after shard that nobody else has, until all are there."""
        while not stop.is_set() and (missing := self._missing()):
            self._files.ahead([self._names[number] for number in missing[:_FETCHED_AHEAD]])
            before = len(self._parts)
            for number in missing:
                if stop.is_set():
                    return
                self._take(number)
            if len(self._parts) == before:
                time.sleep(_POLL)

    def _missing(self) -> list[int]:
        """What is not there yet, from this rank's own place on, so that ranks do not all begin at the same."""
        numbers = [number for number in range(len(self._names)) if number not in self._parts]
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        start = len(numbers) * rank // max(world_size, 1)
        return numbers[start:] + numbers[:start]

    def _take(self, number: int) -> None:
        """Makes a part, unless another thread or process is at it."""
        if number in self._parts:
            return
        with _alone(self._path(number).with_suffix(".lock")) as mine:
            if not mine:
                return
            part = read_part(self._path(number))
            if part is None:
                part = retried(f"{self._files.place}/{self._names[number]}", self._retry_seconds, lambda: self._read(number))
                if part is not None:
                    write_part(self._path(number), part)
            self._parts[number] = part

    def _read(self, number: int) -> Part | None:
        name = self._names[number]
        try:
            path = self._files.path(name)
        except FileNotFoundError:
            return None
        try:
            return make_part(path)
        finally:
            if not isinstance(self._files, LocalFiles):
                self._files.release(name)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.npz"


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether this thread alone holds the lock file now."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
