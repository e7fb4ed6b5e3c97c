"""How alike models' images from the same noise are: the consistency of Xu et al. 2024 (section 3.1), in dB.

    PSNR(a, b) = 10 log10(1 / MSE(a, b)),  MSE the mean over the pixels of two images of [0, 1]

Of images of 8 bits an error below that of rounding cannot be seen: MSE counts as at least (1/255)^2 / 12, a PSNR of at most 58.92 dB.
Images of one class look alike whatever the noise. So the control compares images of the same conditions from other noise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_MSE = (1 / 255) ** 2 / 12
MOST_DB = -10 * math.log10(LEAST_MSE)

Images = NDArray[np.uint8]  # [n, H, W, C]


class Mean(NamedTuple):
    """A mean over samples and its standard error, both in dB."""

    value: float
    error: float


class Pair(NamedTuple):
    """Two models' images: from the same noise, from other noise of the same conditions, and what the noise alone explains."""

    same: Mean
    control: Mean
    gain: Mean


def psnr(first: Images, second: Images) -> NDArray[np.float64]:
    """PSNR [n] in dB of each two images. Raises ValueError where the shapes differ."""
    if first.shape != second.shape:
        raise ValueError(f"images of one shape are compared, got {first.shape} and {second.shape}")
    difference = (first.astype(np.float64) - second.astype(np.float64)) / 255
    mse = np.square(difference).reshape(len(first), -1).mean(axis=1)
    return -10 * np.log10(np.maximum(mse, LEAST_MSE))


def compared(first: Images, second: Images, period: int) -> Pair:
    """Two models' images [n] of the same numbers. The control is image i of the one and image i + period of the other, in a circle.

    Args:
        period: after how many numbers the conditions come again; divides n, and is less than it.

    Raises:
        ValueError: a period that leaves no image of other noise and the same conditions.
    """
    if not 1 <= period < len(first) or len(first) % period:
        raise ValueError(f"the period must divide the number of images and be less, got {period} and {len(first)}")
    same, control = psnr(first, second), psnr(first, np.roll(second, -period, axis=0))
    return Pair(mean(same), mean(control), mean(same - control))


def mean(values: NDArray[np.float64]) -> Mean:
    """The mean of [n] and its standard error; that of a single value is not known (NaN)."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(float(values.mean()), error)


def matrix(models: Sequence[Images], period: int) -> list[list[Pair]]:
    """Every model against every model [M][M], symmetric; on the diagonal a model against itself, whose control is its own variety."""
    rows: list[list[Pair]] = []
    for i, first in enumerate(models):
        rows.append([rows[j][i] if j < i else compared(first, models[j], period) for j in range(len(models))])
    return rows
