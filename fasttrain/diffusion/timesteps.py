"""Which timestep a position draws: pure functions of (seed, position), so that any step can be replayed on any number of ranks."""

from dataclasses import dataclass
from typing import Protocol

import torch
from fasttrain_kernels.philox import Purpose, philox, uniform
from torch import Tensor

from fasttrain.registry import Registry

TIMESTEPS = Registry("timesteps")

# 2^64 / golden ratio, odd: of all steps the one whose multiples modulo 2^64 spread most evenly. As the int64 of the same bits.
GOLDEN_STEP = 0x9E3779B97F4A7C15 - 2**64


class Timesteps(Protocol):
    """A distribution of timesteps, as numbers that `schedule.timestep` maps to t."""

    def draw(self, seed: Tensor, position: Tensor) -> Tensor:
        """u [B] float64 in [0, 1) of seed [] int64 and position [B] int64."""


@TIMESTEPS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Independent uniform draws, one Philox counter a position."""

    def draw(self, seed: Tensor, position: Tensor) -> Tensor:
        """u [B] float64 in [0, 1)."""
        return uniform(seed, position, Purpose.TIMESTEP)


@TIMESTEPS.register("stratified")
@dataclass(frozen=True)
class Stratified:
    """A low-discrepancy sequence in the position: any run of successive positions covers [0, 1) evenly.

    u_n = frac(offset(seed) + n / golden ratio)    [Weyl 1916]; each u_n alone is uniform over the seeds.

    Computed in 64-bit integers, so it is exact at any position; the 53 leading bits are kept.
    """

    def draw(self, seed: Tensor, position: Tensor) -> Tensor:
        """u [B] float64 in [0, 1)."""
        low, high, _, _ = philox(seed, 0, Purpose.TIMESTEP, torch.zeros_like(position[:1]))
        phase = (high << 32) + low + position * GOLDEN_STEP
        # The shift copies the sign bit: the mask makes the 64 bits unsigned again.
        return ((phase >> 11) & (2**53 - 1)).double() * 2.0**-53
