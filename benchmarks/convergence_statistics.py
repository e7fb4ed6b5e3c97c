"""How many images a quality takes, and how many times fewer than another way takes: with intervals, bounds and divergence told apart.

A curve is scores (lower is better) after numbers of images. Between its points it is a straight line on logarithmic axes. What a run
did not show is a bound: a quality that it had at its first point took at most that many images, one that it did not reach took more than
its last. A speed-up over a baseline is the quotient of the images of two runs of the same seed; over the seeds, the mean of its logarithm
with Student's t-interval. Where some pairs are bounds, that interval is taken with the bounds as values, and only the end on which they
are safe is told: the upper one where pairs are at most this, the lower one where they are at least this.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LEVEL = 0.95
INFINITE = math.inf
MOST_LOGARITHM = 700.0  # of what a float64 holds: two very different pairs have a wide interval


class Point(NamedTuple):
    """A score after so many images."""

    images: float
    score: float


@dataclass(frozen=True)
class Curve:
    """One run's scores, by images. `diverged`: it ended by divergence, or far from anything learned."""

    points: tuple[Point, ...]
    diverged: bool = False

    def best(self, until: float = INFINITE) -> float:
        """The lowest score within so many images; inf where there is none."""
        return min((point.score for point in self.sound() if point.images <= until), default=INFINITE)

    def sound(self) -> list[Point]:
        """The points whose score is a number."""
        return [point for point in self.points if math.isfinite(point.score)]


class Span(NamedTuple):
    """Something known to lie between two numbers; exactly known where they are one."""

    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high


class Mean(NamedTuple):
    """A mean over runs and its interval, which one run does not have."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class SpeedUp:
    """How many times fewer images an arm needed than another, over paired seeds.

    Attributes:
        value: their geometric mean, where every pair is known exactly; `interval` at level 95 %, from two pairs on.
        at_least, at_most: where some pairs are bounds, the interval's end with the bounds as values; one pair: its bound; None: not known.
        pairs: pairs that count. bounds: how many of them are bounds.
        diverged: pairs whose arm diverged before it got there; they do not count.
        reached: how many runs of the arm got there.
    """

    value: float | None
    interval: tuple[float, float] | None
    at_least: float | None
    at_most: float | None
    pairs: int
    bounds: int
    diverged: int
    reached: int

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**vars(self), "interval": None if self.interval is None else list(self.interval)}


def images_to(curve: Curve, threshold: float) -> Span | None:
    """Images after which a curve first lies at or below a threshold; None: it diverged before."""
    before: Point | None = None
    for point in curve.sound():
        if point.score <= threshold:
            return Span(*(2 * [_between(before, point, threshold)])) if before else Span(0.0, point.images)
        before = point
    if curve.diverged:
        return None
    return Span(before.images if before else 0.0, INFINITE)


def _between(before: Point, after: Point, threshold: float) -> float:
    """Where the straight line through two points, on logarithmic axes, meets the threshold."""
    if after.score <= 0:  # equal to the reference: no logarithm, and nothing to share
        return after.images
    share = math.log(before.score / threshold) / math.log(before.score / after.score)
    return math.exp(math.log(before.images) + share * math.log(after.images / before.images))


def thresholds_of(baseline: Sequence[Curve], budget: float, fractions: Sequence[float]) -> list[float]:
    """The scores that every run of the baseline had reached by these fractions of the budget, from the worst; no other arm is looked at.

    Runs that diverged are left out. Fractions within which some run has no point give no threshold, and equal ones count once.
    """
    runs = [curve for curve in baseline if not curve.diverged]
    found = {max((curve.best(fraction * budget) for curve in runs), default=INFINITE) for fraction in fractions}
    return sorted((score for score in found if math.isfinite(score) and score > 0), reverse=True)


def speed_up(arm: Sequence[Curve], over: Sequence[Curve], threshold: float) -> SpeedUp:
    """Images of `over` divided by those of `arm` to one threshold; the curves are paired by their places."""
    pairs, diverged, reached = [], 0, 0
    for ours, theirs in zip(arm, over, strict=True):
        needed, others = images_to(ours, threshold), images_to(theirs, threshold)
        reached += needed is not None and math.isfinite(needed.high)
        diverged += needed is None
        if needed is not None and others is not None:
            pairs.append(_log_quotient(others, needed))
    return _combined(pairs, diverged, reached)


def _log_quotient(over: Span, arm: Span) -> Span:
    return Span(_log(over.low) - _log(arm.high), _log(over.high) - _log(arm.low))


def _log(value: float) -> float:
    return -INFINITE if value == 0 else math.log(value)


def _combined(pairs: Sequence[Span], diverged: int, reached: int) -> SpeedUp:
    bounds = sum(not pair.exact for pair in pairs)
    lows, highs = _ends([pair.low for pair in pairs]), _ends([pair.high for pair in pairs])
    counted = (len(pairs), bounds, diverged, reached)
    if pairs and not bounds:
        return SpeedUp(math.exp(statistics.fmean(pair.low for pair in pairs)), lows, None, None, *counted)
    if len(pairs) == 1:
        return SpeedUp(None, None, _finite_exp(pairs[0].low), _finite_exp(pairs[0].high), *counted)
    return SpeedUp(None, None, lows and lows[0], highs and highs[1], *counted)


def _ends(logarithms: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the geometric mean; None where it has none, or where something is not known at all."""
    if len(logarithms) < 2 or not all(map(math.isfinite, logarithms)):
        return None
    interval = mean_of(logarithms).interval
    return interval and (_exp(interval[0]), _exp(interval[1]))


def _finite_exp(value: float) -> float | None:
    return math.exp(value) if math.isfinite(value) else None


def _exp(value: float) -> float:
    return math.exp(min(value, MOST_LOGARITHM))


def mean_of(values: Sequence[float], level: float = LEVEL) -> Mean:
    """The mean and its t-interval: mean +- t s / sqrt(n) with n - 1 degrees of freedom."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Mean(mean, None)
    half = t_quantile(0.5 + level / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(mean, (mean - half, mean + half))


def t_quantile(probability: float, degrees: int) -> float:
    """Student's t below which this share lies, for a share above one half: `t_within` inverted by bisection."""
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(f"a share between 0.5 and 1, and at least one degree of freedom; got {probability}, {degrees}")
    low, high = 0.0, 1.0
    while t_within(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < 2 * probability - 1 else (low, middle)
    return high


def t_within(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's distribution: a finite sum for whole degrees [Abramowitz and Stegun 1964, 26.7.3 and 26.7.4]."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(theta), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for number in range(degrees // 2):
        total += term
        # The next factor: 2/3, 4/5, ... for odd degrees, 1/2, 3/4, ... for even ones.
        term *= cosine**2 * (2 * number + 1 + odd) / (2 * number + 2 + odd)
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
