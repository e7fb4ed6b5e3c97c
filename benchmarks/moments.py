"""The moments of a run at which it can be killed: announced by each rank as it comes to them, in its training thread and in its saving."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fasttrain.checkpoint import step_of
from fasttrain.engine.activity import Activity
from fasttrain.saving import Saver

TRAINING = ("data", "forward", "backward", "update")
# Copying the state; writing this rank's share, with its receipt; from there to the commit, which rank 0 makes; over.
SAVING = ("snapshot", "writing", "committing", "saved")


class Moment(NamedTuple):
    """Something that a rank has come to: when (time.monotonic), what, and in which step."""

    at: float
    what: str
    step: int

    @classmethod
    def of(cls, line: bytes) -> "Moment":
        at, what, step = line.decode().split()
        return cls(float(at), what, int(step))


def announce(descriptor: int) -> None:
    """From now on this process writes a line to `descriptor` whenever it comes to another moment. The run itself stays as it is."""

    def say(what: str, step: int) -> None:
        os.write(descriptor, f"{time.monotonic():.6f} {what} {step}\n".encode())

    _around(Activity, "begin", before=lambda activity, what, step: say(what, step))
    _around(Saver, "begin", before=lambda saver, state, plan: say("snapshot", plan.progress.step))
    _around(
        Saver,
        "_write_share",
        before=lambda saver, partial: say("writing", step_of(partial)),
        after=lambda saver, partial: say("committing", step_of(partial)),
    )
    _around(Saver, "_attempt", after=lambda saver, plan: say("saved", plan.progress.step))


def _around(owner: type, name: str, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None) -> None:
    method = getattr(owner, name)

    def announced(*args: Any) -> Any:
        if before is not None:
            before(*args)
        done = method(*args)
        if after is not None:
            after(*args)
        return done

    setattr(owner, name, announced)
