"""Progress of a preparation, seen from its folder: it needs no channel from the processes that do the work, nor from other hosts."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LOOK_SECONDS = 0.5


def speed(rate: float, unit: str = "images") -> str:
    """Images, or whatever is made, a second, with digits enough for a slow encoder."""
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2f} {unit}/s"


class FolderProgress:
    """A bar on a terminal, a plain line now and then elsewhere; `done()` tells how many samples are written."""

    def __init__(self, what: str, total: int, done: Callable[[], int], line_seconds: float = 10.0, unit: str = "images"):
        self._what = what
        self._total = total
        self._done = done
        self._line_seconds = line_seconds
        self._unit = unit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._bar if sys.stderr.isatty() else self._lines, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _bar(self) -> None:
        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        start, already = time.monotonic(), self._done()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(self._what, total=self._total, completed=already, rate="")
            ended = False
            while not ended:
                ended = self._stop.wait(_LOOK_SECONDS)
                done = self._done()
                progress.update(task, completed=done, rate=speed((done - already) / (time.monotonic() - start), self._unit))

    def _lines(self) -> None:
        start, already = time.monotonic(), self._done()
        while not self._stop.wait(self._line_seconds):
            done = self._done()
            rate = (done - already) / (time.monotonic() - start)
            left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else "time left unknown"
            print(f"{self._what}: {done:,} of {self._total:,} ({speed(rate, self._unit)}, {left})", file=sys.stderr, flush=True)
