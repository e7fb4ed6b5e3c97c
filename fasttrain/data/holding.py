"""Opened shards, kept open as long as their files may be held."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from fasttrain.data.files import ShardFiles

T = TypeVar("T")


class _Slot(Generic[T]):
    """One shard: what was opened of it, and how many threads are reading it."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.lock = threading.Lock()
        self.users = 0


class Holding(Generic[T]):
    """What `opened(number)` made of each shard, once; the least recently used are let go where files may not all be held.

    Args:
        files: where the shards are.
        names: their files.
        sizes: their bytes, as the index says.
        opened: number -> what to keep. Runs once a shard at a time; what it raises is raised to everyone who asks.
    """

    def __init__(self, files: ShardFiles, names: Sequence[str], sizes: Sequence[int], opened: Callable[[int], T]):
        self._files, self._names, self._sizes, self._opened = files, names, sizes, opened
        self._most = files.most_held
        self._lock = threading.Lock()
        self._slots: OrderedDict[int, _Slot[T]] = OrderedDict()
        self._held = 0

    @contextmanager
    def use(self, number: int) -> Iterator[T]:
        """What is kept of a shard; it stays open inside the context."""
        slot = self._take(number)
        try:
            if slot.value is None:
                with slot.lock:
                    if slot.value is None:
                        slot.value = self._opened(number)
            yield slot.value
        finally:
            with self._lock:
                slot.users -= 1

    def _take(self, number: int) -> _Slot[T]:
        with self._lock:
            slot = self._slots.get(number)
            if slot is None:
                self._make_room(self._sizes[number])
                slot = self._slots[number] = _Slot()
                self._held += self._sizes[number]
            elif self._most is not None:
                self._slots.move_to_end(number)
            slot.users += 1
            return slot

    def _make_room(self, size: int) -> None:
        """Lets go of shards that nobody reads, the oldest first, until one more of `size` bytes may be held."""
        if self._most is None:
            return
        for number in [n for n, slot in self._slots.items() if not slot.users]:
            if self._held + size <= self._most:
                return
            self._slots.pop(number).value = None
            self._held -= self._sizes[number]
            self._files.release(self._names[number])
