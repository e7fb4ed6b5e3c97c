"""What this process's training thread is doing: noted by it, read by others from their own threads."""

import time
from typing import NamedTuple


class Doing(NamedTuple):
    """One thing that the training thread does.

    Attributes:
        what: "starting", "data", "forward", "backward", "comparing", "update", "saving", "reporting", "looking", "resuming" or
            "finishing" (waiting for the last save).
        step: the step under way, 1 for the first.
        number: how many things came before it: the ranks of a run all do the same things in the same order, so the one behind is late.
        since: time.monotonic() of its beginning.
    """

    what: str
    step: int
    number: int
    since: float


class Activity:
    """Where the training thread notes what it begins; one assignment, so other threads read it whole."""

    def __init__(self) -> None:
        self.now = Doing("starting", 0, 0, time.monotonic())

    def begin(self, what: str, step: int) -> None:
        """Notes what begins now."""
        self.now = Doing(what, step, self.now.number + 1, time.monotonic())

    def renew(self) -> None:
        """Says that what was begun goes on well: for something long that is made of pieces."""
        self.now = self.now._replace(since=time.monotonic())
