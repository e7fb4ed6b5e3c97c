"""Which timestep a position draws: pure functions of (seed, position), so that any step can be replayed on any number of ranks."""

from dataclasses import dataclass
from typing import Protocol

from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform
from torch import Tensor

from fasttrain.registry import Registry

TIMESTEPS = Registry("timesteps")


class Timesteps(Protocol):
    """A distribution of timesteps, as numbers that `schedule.timestep` maps to t."""

    def draw(self, seed: Tensor, position: Tensor, impl: str = "auto") -> Tensor:
        """u [B] float64 in [0, 1) of seed [] int64 and position [B] int64; `impl` of the operation `uniform`."""


@TIMESTEPS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Independent uniform draws, one Philox counter a position."""

    def draw(self, seed: Tensor, position: Tensor, impl: str = "auto") -> Tensor:
        """u [B] float64 in [0, 1)."""
        return uniform(seed, position, Purpose.TIMESTEP, impl=impl)


@TIMESTEPS.register("stratified")
@dataclass(frozen=True)
class Stratified:
    """A low-discrepancy sequence in the position: any run of successive positions covers [0, 1) evenly.

    u_n = frac(offset(seed) + n / golden ratio)    [Weyl 1916]; each u_n alone is uniform over the seeds.
    """

    def draw(self, seed: Tensor, position: Tensor, impl: str = "auto") -> Tensor:
        """u [B] float64 in [0, 1)."""
        return uniform(seed, position, Purpose.TIMESTEP, stratified=True, impl=impl)
