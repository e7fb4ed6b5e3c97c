"""Which timestep a position draws: pure functions of (seed, position), so that any step can be replayed on any number of ranks."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform
from torch import Tensor

from fasttrain.diffusion.schedule import Schedule
from fasttrain.registry import Registry, shown

TIMESTEPS = Registry("timesteps")
FURTHEST_LOGIT = 20.0  # one part in 5e8 of the path is left beyond it


class Timesteps(Protocol):
    """A distribution of timesteps, as numbers that `schedule.timestep` maps to t."""

    def draw(self, seed: Tensor, position: Tensor, impl: str = "auto") -> Tensor:
        """u [B] float64 in [0, 1) of seed [] int64 and position [B] int64; `impl` of the operation `uniform`."""


@runtime_checkable
class OfPlaces(Protocol):
    """A distribution that is declared on places t / T: which uniform numbers lead there is the schedule's to say."""

    def on(self, schedule: Schedule) -> Timesteps:
        """The distribution of uniform numbers that it is under this schedule."""


def drawn_on(timesteps: Timesteps | OfPlaces, schedule: Schedule) -> Timesteps:
    """The timesteps as uniform numbers for this schedule."""
    return timesteps.on(schedule) if isinstance(timesteps, OfPlaces) else timesteps


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


@TIMESTEPS.register("logit_normal")
@dataclass(frozen=True)
class LogitNormal:
    """Draws whose logit is normal, which favours the middle of the path: what rectified flow is trained with [Esser et al. 2024, Eq. 19].

    u = 1 / (1 + exp(-(mean + std z))),  z = inverse normal distribution function of a uniform number

    Args:
        mean: of the logit; above 0 it favours noise. std: its deviation.
        stratified: the uniform numbers are those of `stratified` instead of `uniform`.

    Raises:
        ValueError: a mean that is not finite or far beyond use, or a std that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0
    stratified: bool = False

    def __post_init__(self) -> None:
        if not abs(self.mean) <= FURTHEST_LOGIT:
            raise ValueError(f"mean must lie between -{FURTHEST_LOGIT} and {FURTHEST_LOGIT}, got {shown(self.mean)}")
        if not 0 < self.std <= FURTHEST_LOGIT:
            raise ValueError(f"std must be positive and at most {FURTHEST_LOGIT}, got {shown(self.std)}")

    def draw(self, seed: Tensor, position: Tensor, impl: str = "auto") -> Tensor:
        """u [B] float64 in [0, 1)."""
        z = torch.special.ndtri(uniform(seed, position, Purpose.TIMESTEP, stratified=self.stratified, impl=impl))
        return torch.sigmoid(self.mean + self.std * z).clamp(max=1 - 2.0**-53)
