"""What every sampler is: from numbered noise to data, whatever the schedule and the target."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.cond import Cond
from fasttrain.diffusion.prediction import Prediction
from fasttrain.diffusion.schedule import Schedule
from fasttrain.registry import Registry, shown

SAMPLERS = Registry("sampler")
MOST_STEPS = 10_000

Model = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x_t [B, C, H, W], t [B], cond of B) -> the target, [B, C, H, W]."""

Noise = Callable[[int], Tensor]
"""Standard normal [B, C, H, W] by number: 0 starts the samples, step + 1 is what that step adds. The same each time it is asked."""


@dataclass(frozen=True)
class Sampler(ABC):
    """From noise to data: what `generate` asks of a sampler.

    Args:
        steps: N; how many evaluations of the model these are is the sampler's own affair.

    Raises:
        ValueError: fewer than one step, or more than anyone could mean.
    """

    steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps must be at least 1 and at most {MOST_STEPS}, got {shown(self.steps)}")

    def require(self) -> None:
        """Raises UserError where a library that it needs is not installed, before anything waits for samples."""
        return

    def caution(self) -> str | None:
        """What to know of samples that are made with so few steps, if anything."""
        return None

    @abstractmethod
    def __call__(self, model: Model, schedule: Schedule, prediction: Prediction, noise: Noise, cond: Cond, dtype: torch.dtype) -> Tensor:
        """x0 [B, C, H, W] float64 for `cond` of B; the state is float64, the model sees `dtype`."""
