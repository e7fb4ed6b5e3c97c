"""Who is at fault when a run cannot go on: the rule, as a function of what rank 0 has heard of each rank.

A rank has died when its connection closed without a goodbye. It is silent when nothing was heard of it for the limit (a stopped process,
a cut link, a lost host). It is stuck when it says that it lives, but has been doing one thing for longer than the limit. All ranks do the
same things in the same order and wait for each other in collectives, so of ranks that are all stuck the ones behind are at fault; where
none is behind, none is named.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fasttrain.errors import Status

DIED = "died: its connection closed without a goodbye (it was killed, it crashed, or its host went down)"

# How long an error waits for the news of another rank's death, of which it may be the echo.
ECHO_SECONDS = 1.0
SURE_SECONDS = 0.3  # the same for errors that say themselves what they are
SURE = {Status.USER_ERROR, Status.DIVERGED, 130, 143}

State = Literal["expected", "alive", "left", "died"]


@dataclass
class Failure:
    """An error that ends one rank: the status it ends with, one line about it, and when rank 0 heard of it."""

    status: int
    told: str
    heard: float


@dataclass
class Member:
    """What rank 0 knows of a rank.

    Attributes:
        heard: rank 0's clock at its last word; the start, before the first.
        place: its host and process, as told in messages.
        machine: equal for processes that can signal each other by their number.
        began: rank 0's clock when it began what it does.
    """

    rank: int
    heard: float
    place: str = "a host not heard of yet"
    pid: int = 0
    machine: str = ""
    state: State = "expected"
    what: str = "starting"
    step: int = 0
    number: int = 0
    began: float = 0.0
    failure: Failure | None = None

    @property
    def here(self) -> bool:
        return self.state in ("expected", "alive")

    def told(self) -> str:
        return f"rank {self.rank} ({self.place})"


@dataclass(frozen=True)
class Verdict:
    """Why a run ends on all ranks.

    Attributes:
        cause: "died", "silent", "stuck" or "failed".
        ranks: those at fault; empty where none can be named.
        told: for people, in one or two sentences.
        status: what the ranks that are not at fault end with.
        seconds: how long it had lasted when it was noticed.
        lowest: the lowest rank that is not at fault; -1 without any.
        stopped: machine and process of those at fault that cannot end by themselves.
    """

    cause: str
    ranks: tuple[int, ...]
    told: str
    status: int
    seconds: float
    lowest: int = -1
    stopped: tuple[tuple[str, int], ...] = field(default=())

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Verdict":
        """From `plain`, also when that has been JSON."""
        ranks, stopped = tuple(plain["ranks"]), tuple((machine, pid) for machine, pid in plain["stopped"])
        return cls(**{**plain, "ranks": ranks, "stopped": stopped})

    def json(self) -> str:
        return json.dumps(self.plain(), indent=1) + "\n"


def judge(members: Collection[Member], now: float, limit: float, patience: Mapping[str, float]) -> Verdict | None:
    """The verdict on what is known at `now`; None while all is well.

    Args:
        limit: seconds of silence, or of one activity, that are too long.
        patience: seconds more for an activity of this name.
    """
    return _dead(members, now) or _failed(members, now) or _silent(members, now, limit) or _stuck(members, limit, patience)


def _dead(members: Collection[Member], now: float) -> Verdict | None:
    dead = [member for member in members if member.state == "died"]
    if not dead:
        return None
    return _verdict("died", dead, members, now - dead[0].heard, f"{_named(dead)} {DIED}; {_doing(dead[0])}")


def _failed(members: Collection[Member], now: float) -> Verdict | None:
    for member in sorted((m for m in members if m.failure), key=lambda m: m.failure.heard if m.failure else 0.0):
        failure = member.failure
        assert failure is not None
        if now - failure.heard >= (SURE_SECONDS if failure.status in SURE else ECHO_SECONDS):
            status = failure.status if failure.status in SURE else int(Status.RESTART)
            told = f"{member.told()} ended by an error; {_doing(member)}: {failure.told}"
            return _verdict("failed", [member], members, now - failure.heard, told, status)
    return None


def _silent(members: Collection[Member], now: float, limit: float) -> Verdict | None:
    silent = [member for member in members if member.here and member.failure is None and now - member.heard > limit]
    if not silent:
        return None
    seconds = now - min(member.heard for member in silent)
    why = f"nothing heard for {seconds:.0f} s (stopped, its host hangs, or its link is cut)"
    return _verdict("silent", silent, members, seconds, f"{_named(silent)}: {why}; when last heard of, {_doing(silent[0])}")


def _stuck(members: Collection[Member], limit: float, patience: Mapping[str, float]) -> Verdict | None:
    alive = [member for member in members if member.state == "alive" and member.failure is None]
    last = min((member.number for member in alive), default=0)
    behind = [member for member in alive if member.number == last]
    # By their own last words: who is silent as well may have gone on since.
    late = [member for member in behind if member.heard - member.began > limit + patience.get(member.what, 0.0)]
    if not late:
        return None
    seconds = max(member.heard - member.began for member in late)
    if len(behind) == len(alive) > 1:
        told = f"all ranks have been doing the same for {seconds:.0f} s, so none can be named; {_doing(late[0])}"
        return _verdict("stuck", [], members, seconds, told)
    others = "; the other ranks wait for it" if len(alive) > 1 else ""
    return _verdict("stuck", late, members, seconds, f"{_named(late)} is stuck: for {seconds:.0f} s {_doing(late[0])}{others}")


def _verdict(
    cause: str,
    at_fault: Collection[Member],
    members: Collection[Member],
    seconds: float,
    told: str,
    status: int = Status.RESTART,
) -> Verdict:
    ranks = tuple(sorted(member.rank for member in at_fault))
    lowest = min((member.rank for member in members if member.state == "alive" and member.rank not in ranks), default=-1)
    stopped = tuple((member.machine, member.pid) for member in at_fault if cause == "silent" and member.pid)
    return Verdict(cause, ranks, told, int(status), round(seconds, 3), lowest, stopped)


def _named(members: Collection[Member], most: int = 8) -> str:
    names = [member.told() for member in sorted(members, key=lambda member: member.rank)]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _doing(member: Member) -> str:
    return f'it was at "{member.what}" of step {member.step}'
