"""Timesteps of one range only: what a network is fine-tuned on, or looked at in."""

from dataclasses import dataclass

import torch
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform
from torch import Tensor

from fasttrain.diffusion.schedule import Schedule
from fasttrain.diffusion.timesteps import TIMESTEPS
from fasttrain.errors import UserError
from fasttrain.registry import shown


@TIMESTEPS.register("window")
@dataclass(frozen=True)
class Window:
    """The schedule's own draws, from a part of the path alone [Hang et al. 2023, figure 2, fine-tunes on such].

    u = u0 + (u1 - u0) v, v uniform; u0 and u1 are where the schedule reaches the timesteps `low` T and `high` T.

    Args:
        low, high: shares of T, 0 at the data and 1 at the noise: of 1,000 timesteps 0.1 and 0.2 are 100 to 199.
        stratified: v is that of `stratified` instead of `uniform`.

    Raises:
        ValueError: not 0 <= low < high <= 1.
    """

    low: float = 0.0
    high: float = 1.0
    stratified: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low and high must satisfy 0 <= low < high <= 1, got {shown(self.low)} and {shown(self.high)}")

    def on(self, schedule: Schedule) -> "Stretch":
        """The uniform numbers that lead into it.

        Raises:
            UserError: no draw of this schedule does.
        """
        low, high = schedule.uniform(schedule.first(torch.tensor([self.low, self.high], dtype=torch.float64))).tolist()
        if not low < high:
            raise UserError(f"diffusion.schedule draws no timestep between {self.low:g} T and {self.high:g} T: choose a wider range")
        return Stretch(low, high, self.stratified)


@dataclass(frozen=True)
class Stretch:
    """Uniform numbers from `low` to below `high`, stratified or not."""

    low: float
    high: float
    stratified: bool

    def draw(self, seed: Tensor, position: Tensor, impl: str = "auto") -> Tensor:
        """u [B] float64 in [low, high)."""
        v = uniform(seed, position, Purpose.TIMESTEP, stratified=self.stratified, impl=impl)
        return (self.low + (self.high - self.low) * v).clamp(max=self.high - 2.0**-53)
