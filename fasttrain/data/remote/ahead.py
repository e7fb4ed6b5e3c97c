"""Files fetched before they are asked for, by a few threads that end with the process."""

import threading
from collections.abc import Callable, Sequence


class Ahead:
    """Fetches what is wanted next, the most urgent first.

    Threads are daemons: a store that hangs must not keep a process from ending.

    Args:
        fetch: fetches a file by name, and raises nothing.
        may_begin: whether there is room for one more beside so many that are on their way; asked again whenever that may have changed.
        threads: how many files are fetched at a time.
    """

    def __init__(self, fetch: Callable[[str], None], may_begin: Callable[[int], bool], threads: int):
        self._fetch = fetch
        self._may_begin = may_begin
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._wanted: list[str] = []
        self._running: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False

    def want(self, names: Sequence[str]) -> None:
        """Says anew which files are wanted, and returns at once; what is being fetched goes on."""
        with self._changed:
            self._wanted = [name for name in names if name not in self._running]
            if self._wanted and not self._threads and not self._closed:
                self._threads = [threading.Thread(target=self._work, name="fasttrain-ahead", daemon=True) for _ in range(self._count)]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    def claim(self, name: str) -> bool:
        """Takes a file over: waits while it is being fetched (returns whether it was), and does not begin with it otherwise."""
        with self._changed:
            self._wanted = [wanted for wanted in self._wanted if wanted != name]
            waited = name in self._running
            self._changed.notify_all()
            while name in self._running:
                self._changed.wait()
            return waited

    def close(self) -> None:
        """Begins with nothing more."""
        with self._changed:
            self._closed = True
            self._wanted = []
            self._changed.notify_all()

    def _work(self) -> None:
        while (name := self._next()) is not None:
            try:
                self._fetch(name)
            finally:
                with self._changed:
                    self._running.discard(name)
                    self._changed.notify_all()

    def _next(self) -> str | None:
        with self._changed:
            while not self._closed and not (self._wanted and self._may_begin(len(self._running))):
                self._changed.wait()
            if self._closed:
                return None
            name = self._wanted.pop(0)
            self._running.add(name)
            return name
