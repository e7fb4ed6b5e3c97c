"""Losses of timestep ranges over training, as curves, and how they change between two networks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Point = tuple[float, float]


class Curve(NamedTuple):
    """(images, loss), in the order of training."""

    points: list[Point]


class Change(NamedTuple):
    """How much each range's mean loss changed, in units of the loss before: [K] float64 each.

    `error` is the standard error of `share`, from the pairs of one sample's losses before and after.
    """

    share: Tensor
    error: Tensor


def averaged(points: Sequence[Point], count: int) -> Curve:
    """Means over each `count` successive points, of images and of losses alike; what is left at the end is a point of fewer."""
    groups = [points[start : start + count] for start in range(0, len(points), count)]
    return Curve([(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups])


def change(before: Tensor, after: Tensor) -> Change:
    """The change between two networks' losses [K, n] float64 on the same samples, noise and timesteps."""
    difference, scale = after - before, before.mean(dim=1)
    return Change(difference.mean(dim=1) / scale, difference.std(dim=1) / difference.shape[1] ** 0.5 / scale.abs())


def told_apart(found: Change, errors: float = 2.0) -> Tensor:
    """Where a change is beyond so many standard errors: [K], -1 better, 1 worse, 0 not told apart."""
    return torch.where(found.share.abs() > errors * found.error, found.share.sign(), torch.zeros_like(found.share))
