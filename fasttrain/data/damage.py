"""What of a set turned out to be unreadable: by shard and reason, counted, and too much of it ends the run."""

import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fasttrain.errors import UserError

_WORST = 3


@dataclass(frozen=True)
class Damaged:
    """One shard: how many of its samples are unreadable, and why the first of them is."""

    shard: str
    unreadable: int
    samples: int
    why: str

    def told(self) -> str:
        """A line for people."""
        if not self.unreadable:
            return f"{self.shard}: {self.why}; all {self.samples} samples verify"
        return f"{self.shard}: {self.unreadable} of {self.samples} samples unreadable ({self.why}); replaced"

    def record(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self)


class Damage:
    """The unreadable samples found so far by one process, in any of its threads.

    Args:
        place: the set, as messages name it.
        samples: of the whole set.
        most: the share of them that may be unreadable.
        remedy: what to do about the files.
    """

    def __init__(self, place: str, samples: int, most: float, remedy: str):
        self._place, self._samples, self._most, self._remedy = place, samples, most, remedy
        self._lock = threading.Lock()
        self._rows: dict[str, set[int]] = {}
        self._shards: dict[str, Damaged] = {}
        self._untold: dict[str, None] = {}

    @property
    def unreadable(self) -> int:
        """Samples known to be unreadable."""
        return sum(map(len, self._rows.values()))

    def found(self, shard: str, rows: Iterable[int], samples: int, why: str) -> None:
        """Notes rows of a shard that cannot be read, or none where only something beside its samples is wrong. Again is once.

        Raises:
            UserError: more of the set is unreadable than may be.
        """
        with self._lock:
            known = self._rows.setdefault(shard, set())
            before = len(known)
            known.update(rows)
            if shard in self._shards and len(known) == before:
                return
            first = self._shards[shard].why if before else why
            self._shards[shard] = Damaged(shard, len(known), samples, first)
            self._untold[shard] = None
        self._check()

    def news(self) -> list[Damaged]:
        """What was found since the last call."""
        with self._lock:
            news = [self._shards[shard] for shard in self._untold]
            self._untold.clear()
        return news

    def _check(self) -> None:
        unreadable = self.unreadable
        if unreadable <= self._most * self._samples:
            return
        worst = sorted(self._shards.values(), key=lambda each: each.unreadable, reverse=True)
        named = "; ".join(f"{each.shard}: {each.unreadable} of {each.samples} ({each.why})" for each in worst[:_WORST])
        more = f"; and {len(worst) - _WORST} more shards" if len(worst) > _WORST else ""
        raise UserError(
            f"{self._place}: {unreadable} of {self._samples} samples are unreadable, more than data.max_damaged {self._most:g} allows: "
            f"{named}{more}; {self._remedy}, or raise data.max_damaged"
        )
