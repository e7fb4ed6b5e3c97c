"""The straight line between two sets of weights, and what the loss does along it: theta(a) = (1 - a) A + a B  [Xu et al. 2024, Eq. 6]."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BEYOND = 0.25  # how far the line goes on behind either end


@dataclass(frozen=True)
class Profile:
    """Losses at places on the line, which hold 0 and 1.

    Attributes:
        at: a, increasing; losses: one each.
    """

    at: Sequence[float]
    losses: Sequence[float]

    @property
    def ends(self) -> tuple[float, float]:
        """The losses of A and of B."""
        return self.losses[self.at.index(0.0)], self.losses[self.at.index(1.0)]

    @property
    def barrier(self) -> float:
        """max over [0, 1] of loss(a) - ((1 - a) loss(A) + a loss(B)), at least 0: what separates A and B  [Frankle et al. 2020].

        Infinite where a loss between the ends is not finite.
        """
        start, end = self.ends
        rises = [loss - ((1 - a) * start + a * end) for a, loss in zip(self.at, self.losses, strict=True) if 0 <= a <= 1]
        return max(rises) if all(map(math.isfinite, rises)) else math.inf

    @property
    def lowest(self) -> float:
        """The a of the lowest loss that is finite; NaN where none is."""
        finite = [(loss, a) for loss, a in zip(self.losses, self.at, strict=True) if math.isfinite(loss)]
        return min(finite, default=(math.nan, math.nan))[1]


def places(points: int) -> list[float]:
    """`points` evenly from 0 to 1, both exact, and on at the same distance by BEYOND on either side. Raises ValueError for fewer than 2."""
    if points < 2:
        raise ValueError(f"a line between two ends has at least 2 points, got {points}")
    more = int(BEYOND * (points - 1))
    return [k / (points - 1) for k in range(-more, points + more)]


def between(first: Mapping[str, Tensor], second: Mapping[str, Tensor], at: float) -> dict[str, Tensor]:
    """The weights at a; exactly `first` at 0 and `second` at 1.

    Raises:
        ValueError: the two are not weights of one network.
    """
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError("both ends must hold the same parameters of the same shapes")
    return {name: torch.lerp(tensor, second[name], at) for name, tensor in first.items()}
