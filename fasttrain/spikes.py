"""Loss spikes: steps whose loss stands far above the recent ones, judged on the host at the log interval, replayable by their position."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.lines import records

RECENT, LEVEL, WARM_UP = 200, 25, 50
# A normal distribution's median absolute deviation is 0.6745 standard deviations; a difference of two has sqrt 2 of them.
_PER_MAD = 1.4826 / math.sqrt(2)
# The least spread assumed of log loss: where the recent losses hardly differ, a percent does not make a spike.
_LEAST = 0.01


class Spike(NamedTuple):
    """A step whose loss lies `deviations` robust standard deviations of log loss above the recent level."""

    step: int
    loss: float
    deviations: float

    def told(self, position: int, images: int, run_dir: Path) -> str:
        """For people: what stands out, the positions it was computed from, and how to look at it."""
        return (
            f"loss spike at step {self.step}: {self.loss:.4f}, {self.deviations:.1f} robust standard deviations above the recent losses; "
            f"positions {position} to {position + images - 1}; look with `fasttrain replay {run_dir} {self.step}`"
        )


class Spikes:
    """Judges each step's loss against those before it; the first `WARM_UP` are taken as they come.

    z = (ln loss - level) / (1.4826 MAD / sqrt 2);  a spike where z > threshold

    level: the median of the last `LEVEL` ln losses; MAD: the median absolute difference from step to step over the last `RECENT`. Neither
    takes a falling loss for noise, and neither is moved far by spikes.

    Args:
        threshold: in robust standard deviations; None: nothing is flagged.
        before: losses of the steps before the first, in order.
    """

    def __init__(self, threshold: float | None, before: Iterable[float] = ()):
        self._threshold = threshold
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._recent.extend(math.log(loss) for loss in before if _judged(loss))

    def judge(self, first_step: int, losses: Sequence[float]) -> list[Spike]:
        """The spikes among consecutive steps' losses. Losses that are not finite are not judged: their steps were skipped."""
        if self._threshold is None:
            return []
        found = [Spike(step, loss, self._take(math.log(loss))) for step, loss in enumerate(losses, first_step) if _judged(loss)]
        return [spike for spike in found if spike.deviations > self._threshold]

    def _take(self, value: float) -> float:
        """How far a log loss stands above the recent ones, to which it is then added."""
        deviations, recent = 0.0, list(self._recent)
        if len(recent) >= WARM_UP:
            spread = _PER_MAD * statistics.median(abs(b - a) for a, b in itertools.pairwise(recent))
            deviations = (value - statistics.median(recent[-LEVEL:])) / max(spread, _LEAST)
        self._recent.append(value)
        return deviations


def recent_losses(metrics: Path, step: int) -> list[float]:
    """The losses of the last `RECENT` recorded steps up to this one, of a run's metrics.jsonl."""
    recent: deque[float] = deque(maxlen=RECENT)
    for record in records(metrics):
        if record["step"] <= step:
            recent.extend(float(loss) for _, loss in losses_by_step(record))
    return list(recent)


def losses_by_step(record: dict[str, Any]) -> Iterator[tuple[int, float]]:
    """(step, loss) of each step that a training record tells of; nothing from other records."""
    losses = record.get("losses")
    if isinstance(losses, list):
        yield from ((step, float(loss)) for step, loss in enumerate(losses, record["step"] - len(losses) + 1))


def _judged(loss: float) -> bool:
    return math.isfinite(loss) and loss > 0
