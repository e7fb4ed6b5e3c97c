"""Where a sampler without a grid of its own goes: at most N of the schedule's timesteps, from the last one down."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fasttrain.diffusion.schedule import Schedule
from fasttrain.registry import nearest, shown
from fasttrain.sampling.sampler import Sampler

# No grid needs more noise than this: sigma / alpha, as of data of deviation 1/2 [Karras et al. 2022, table 1].
MOST_NOISE = 80.0


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """Even in time. The last step leaves for the data from t = T / N - 1: with few steps from much noise still."""
    return schedule.spaced(steps)


def log_snr(schedule: Schedule, steps: int) -> Tensor:
    """Even in lambda = log(alpha / sigma), down to the schedule's least noise   [Lu et al. 2022, "DPM-Solver", section 3.3].

    The first is the last timestep or `MOST_NOISE`, whichever is less noise: a cosine schedule ends at sigma / alpha = 20,000, by which the
    step from there would multiply the error of a network that predicts eps. A schedule that ends in noise alone begins there, as it was
    trained to [Lin et al. 2023, section 3.3]. Fewer than `steps` where neighbours round to one timestep.
    """
    least, most = schedule.edm_limits
    sigmas = torch.linspace(math.log(min(most, MOST_NOISE)), math.log(least), steps, dtype=torch.float64).exp()
    t, last = schedule.nearest(sigmas), schedule.spaced(1)
    no_data = schedule.alpha_sigma(last)[0].item() == 0
    return torch.unique_consecutive(torch.cat([last, t[1:]]) if no_data else t)


SPACINGS: Mapping[str, Callable[[Schedule, int], Tensor]] = {"trailing": trailing, "log_snr": log_snr}
"""(schedule, N) -> timesteps [at most N], decreasing, on the host."""


@dataclass(frozen=True)
class Spaced(Sampler):
    """A sampler that visits N timesteps of a named spacing, once each.

    What is left of the deviation of normal data at 50 steps with the best network [computed: tests/sampling/test_spacing.py], for parts
    of the data of deviation 0.5 and, as fine detail has, 0.1:

        schedule                    first order (euler, ddim)              second order (dpm_solver)
                                    trailing        log_snr                trailing        log_snr
        cosine                      .969  .864      .953  .951             1.001  .930     1.002  1.000
        cosine, rescale 2           .946  .722      .956  .948              .997  .762     1.002   .994
        scaled_linear               .940  .585      .969  .930              .971  .596     1.001   .964
        scaled_linear, rescale 2    .850  .346      .962  .835              .883  .348      .995   .865
        flow                        .971  .914      .944  .944             1.003 1.001     1.003  1.003
        flow, shift 3               .943  .777      .944  .944             1.009  .848     1.003  1.003

    Args:
        spacing: one of `SPACINGS`. "trailing" for few steps where the schedule ends in little noise, and for figures of papers that
            took it; "log_snr" wherever detail counts, and where the schedule is rescaled, shifted or scaled_linear.

    Raises:
        ValueError: as Sampler; or another spacing.
    """

    spacing: str = field(default="trailing", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spacing not in SPACINGS:
            raise ValueError(f"unknown spacing {shown(self.spacing)}; {nearest(self.spacing, SPACINGS)}")

    def timesteps(self, schedule: Schedule) -> Tensor:
        """The timesteps [at most N] to visit, from much noise to little, on the host."""
        return SPACINGS[self.spacing](schedule, self.steps)
