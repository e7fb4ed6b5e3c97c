"""Weightings given range of timesteps by range: a table from a config, and one that is solved for during training.

Timestep t lies in range floor(t K / T), whatever share of the draws a schedule sends there. Which SNRs a range holds is the schedule's to
say, so these weightings become functions of snr by `placed`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fasttrain.diffusion.schedule import Schedule
from fasttrain.diffusion.weighting import WEIGHTINGS, Weighting, signal_to_noise
from fasttrain.errors import UserError
from fasttrain.registry import shown

MOST_RANGES = 1000
# Beyond rounding, and far less than from one timestep to the next: an edge and the same timestep on another device are equal.
_SLACK = 1e-9
_LEAST_SNR = 1e-300  # a straight line over log snr needs a number where no data is left


@runtime_checkable
class OfRanges(Protocol):
    """A weighting that is declared on ranges of timesteps."""

    def on(self, schedule: Schedule) -> Weighting:
        """The function of snr that it is under this schedule."""


def placed(weighting: Weighting, schedule: Schedule) -> Weighting:
    """The weighting as a function of snr under this schedule."""
    return weighting.on(schedule) if isinstance(weighting, OfRanges) else weighting


@dataclass(frozen=True)
class Steps:
    """One weight for each stretch of snr.

    Args:
        edges: the snr of the first timestep of ranges 1 .. K - 1, falling.
        weights: [K].
    """

    edges: tuple[float, ...]
    weights: tuple[float, ...]
    _places: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, snr: Tensor) -> Tensor:
        """The weight of the stretch that snr lies in."""
        edges, weights = _on(self._places, snr.device, self.edges, self.weights)
        return weights[(snr[..., None] <= edges * (1 + _SLACK)).sum(-1)]


@dataclass(frozen=True)
class Ramps:
    """Weights at some snr, falling, and straight lines over log snr between them; beyond the ends as at the ends."""

    knots: tuple[float, ...]
    weights: tuple[float, ...]
    _places: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, snr: Tensor) -> Tensor:
        """The interpolated weight."""
        knots, weights = _on(self._places, snr.device, tuple(-math.log(max(knot, _LEAST_SNR)) for knot in self.knots), self.weights)
        if len(weights) == 1:
            return weights.expand(snr.shape)
        at = (-snr.clamp(min=_LEAST_SNR).log()).clamp(knots[0], knots[-1])
        right = torch.searchsorted(knots, at.contiguous()).clamp(1, len(knots) - 1)
        share = (at - knots[right - 1]) / (knots[right] - knots[right - 1])
        return weights[right - 1] + share * (weights[right] - weights[right - 1])


@WEIGHTINGS.register("table")
@dataclass(frozen=True)
class Table:
    """A weight for each of K equal ranges of timesteps, from data to noise.

    Args:
        weights: [K], on the squared x0 error; what counts is how they compare.
        shape: `step`: each holds throughout its range; `linear`: at its middle, with straight lines over log snr between.

    Raises:
        ValueError: no weights, too many, or one that is negative or not finite, or all 0.
    """

    weights: tuple[float, ...] = (1.0,)
    shape: Literal["step", "linear"] = "step"

    def __post_init__(self) -> None:
        if not 1 <= len(self.weights) <= MOST_RANGES:
            raise ValueError(f"weights must be 1 to {MOST_RANGES} numbers, got {len(self.weights)}")
        if not (all(0 <= w < math.inf for w in self.weights) and sum(self.weights) > 0):
            raise ValueError(f"weights must be finite, none below 0 and one above it, got {shown(self.weights)}")

    def on(self, schedule: Schedule) -> Weighting:
        """The function of snr that it is under this schedule.

        Raises:
            UserError: there are more ranges than timesteps.
        """
        edges = range_edges(schedule, len(self.weights))
        if self.shape == "linear":
            middles = torch.div(edges[:-1] + edges[1:], 2, rounding_mode=None if edges.is_floating_point() else "floor")
            return Ramps(_snr_at(schedule, middles), self.weights)
        return Steps(_snr_at(schedule, edges[1:-1]), self.weights)

    def __call__(self, snr: Tensor) -> Tensor:
        """Of a table of one weight alone; more need a schedule: see `placed`."""
        if len(self.weights) > 1:
            raise TypeError("a table of several weights needs a schedule: use placed(table, schedule)")
        return torch.full_like(snr, self.weights[0])


@WEIGHTINGS.register("pareto")
@dataclass(frozen=True)
class Pareto:
    """Weights of timestep ranges that are solved for during training, from the network's gradients [Hang et al. 2023, Eq. 11-13].

    Slow: each time a gradient for each range is taken of `samples` images (the paper's reference, not its recommendation). The weights sum
    to K, so that their mean is 1.

    Args:
        solver: `ugd`, or `frank_wolfe`, which finds the optimum.
        ranges: K.
        every: steps between two solutions.
        samples: images for each range's gradient; a multiple of twice the processes.
        regularisation: lambda of Eq. 11, in units of the mean squared gradient.
        iterations, rate: of `ugd`: see `research.ugd`.

    Raises:
        ValueError: a number that cannot be.
    """

    solver: Literal["ugd", "frank_wolfe"] = "ugd"
    ranges: int = 10
    every: int = 100
    samples: int = 64
    regularisation: float = 0.1
    iterations: int = 250
    rate: float = 30.0

    def __post_init__(self) -> None:
        if not 2 <= self.ranges <= MOST_RANGES:
            raise ValueError(f"ranges must lie between 2 and {MOST_RANGES}, got {shown(self.ranges)}")
        for key, least in (("every", 1), ("samples", 2), ("iterations", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {shown(getattr(self, key))}")
        if self.samples % 2:
            raise ValueError(f"samples must be even, got {shown(self.samples)}: each half of them gives an estimate")
        if not 0 <= self.regularisation < math.inf or not 0 < self.rate < math.inf:
            raise ValueError(f"regularisation must not be negative and rate must be positive, got {self.regularisation} and {self.rate}")

    def __call__(self, snr: Tensor) -> Tensor:
        """1 at every snr: the weights before the first solution."""
        return torch.ones_like(snr)


def range_edges(schedule: Schedule, ranges: int) -> Tensor:
    """The first timestep of each of `ranges` equal ranges, and T: t [ranges + 1]. Raises UserError for more ranges than timesteps."""
    if ranges > schedule.num_timesteps:
        raise UserError(f"{ranges} ranges of {schedule.num_timesteps} timesteps are more than there are timesteps: choose fewer")
    return schedule.first(torch.arange(ranges + 1, dtype=torch.float64) / ranges)


def _snr_at(schedule: Schedule, t: Tensor) -> tuple[float, ...]:
    return tuple(signal_to_noise(*schedule.alpha_sigma(t)).tolist())


def _on(places: dict[torch.device, tuple[Tensor, Tensor]], device: torch.device, *columns: tuple[float, ...]) -> tuple[Tensor, ...]:
    # Copied to a device once: a copy per call would wait for the host.
    if device not in places:
        first, second = (torch.tensor(column, dtype=torch.float64, device=device) for column in columns)
        places[device] = first, second
    return places[device]
