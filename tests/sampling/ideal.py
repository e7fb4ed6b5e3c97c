"""Data whose best network is known in closed form: normally distributed, so that samplers can be compared with the exact solution."""

import torch
from torch import Tensor

from fasttrain.cond import Cond
from fasttrain.diffusion.prediction import PREDICTIONS, Prediction
from fasttrain.diffusion.schedule import SCHEDULES, Schedule
from fasttrain.sampling.sampler import Noise, Sampler

SPREAD, CENTRE = 0.5, 0.25
COND = Cond(labels=torch.zeros(6, dtype=torch.int64))
SCHEDULE: dict[str, Schedule] = {name: SCHEDULES.build(name) for name in SCHEDULES.names()}
TARGET: dict[str, Prediction] = {name: PREDICTIONS.build(name) for name in PREDICTIONS.names()}


class Ideal:
    """The best possible network for data that is normal with mean CENTRE and deviation SPREAD, or another, in any target."""

    def __init__(self, schedule: Schedule, prediction: Prediction, spread: float = SPREAD):
        self.schedule = schedule
        self.prediction = prediction
        self.spread = spread
        self.timesteps: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.timesteps.append(t)
        self.dtypes.add(x_t.dtype)
        alpha, sigma = (c[:, None, None, None] for c in self.schedule.alpha_sigma(t))
        gain = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        x0 = CENTRE + gain * (x_t.double() - alpha * CENTRE)
        a, b = self.prediction.coefficients(alpha, sigma)
        return a * x0 + b * (x_t.double() - alpha * x0) / sigma


def start() -> Tensor:
    """The noise that the samples start from."""
    return torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def noise(draw: int) -> Tensor:
    """The samples' noise by the number of its draw."""
    return torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(draw))


def no_more_noise() -> Noise:
    """Noise for samplers that must not draw any but the first."""

    def first(draw: int) -> Tensor:
        assert draw == 0, "a deterministic sampler drew noise on its way"
        return noise(0)

    return first


def exact_end(schedule: Schedule, timesteps: Tensor) -> Tensor:
    """Where the flow of the normal distribution takes the noise from the first of these timesteps to the last, denoised there.

    The flow keeps each x at its number of standard deviations; what the last timestep leaves is the schedule's matter, not the sampler's.
    """
    alpha, sigma = schedule.alpha_sigma(timesteps[[0, -1]])
    spread = torch.hypot(alpha * SPREAD, sigma)
    deviations = (torch.hypot(alpha[0], sigma[0]) * start() - alpha[0] * CENTRE) / spread[0]
    return CENTRE + deviations * alpha[1] * SPREAD**2 / spread[1]


def deviation(sampler: Sampler, schedule: Schedule, spread: float) -> float:
    """Of the samples that two pixels of noise, one deviation apart, lead to: a sampler of normal data is linear in its noise."""
    ends = sampler(
        Ideal(schedule, TARGET["v"], spread),
        schedule,
        TARGET["v"],
        lambda draw: torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 1, 1, 2),
        Cond(labels=torch.zeros(1, dtype=torch.int64)),
        torch.float64,
    ).flatten()
    return (ends[1] - ends[0]).item()
