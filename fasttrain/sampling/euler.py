"""Euler's method: first order, one evaluation a step, for every target and schedule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.cond import Cond
from fasttrain.diffusion.prediction import Prediction, to_eps, to_x0
from fasttrain.diffusion.schedule import Schedule
from fasttrain.sampling.sampler import SAMPLERS, Model, Noise
from fasttrain.sampling.spacing import Spaced


@SAMPLERS.register("euler")
@dataclass(frozen=True)
class Euler(Spaced):
    """From t to s along the line that the model sees at t, ending in x0 itself:

        x_s = alpha_s x0 + sigma_s eps

    For rectified flow that is x_s = x_t + (s - t) / T (eps - x0), Euler's method on its equation [Esser et al. 2024, Eq. 1]; in sigma
    space, x = x_t / alpha_t, it is Euler's method on Heun's equation [Karras et al. 2022, Eq. 1]; on variance-preserving schedules it is
    DDIM [Song et al. 2021, Eq. 12]. One evaluation at each timestep of the spacing; neither end is divided by.

    Args:
        steps: N.
        spacing: as Spaced.
    """

    steps: int = 50

    def __call__(self, model: Model, schedule: Schedule, prediction: Prediction, noise: Noise, cond: Cond, dtype: torch.dtype) -> Tensor:
        """x0 [B, C, H, W] float64 for `cond` of B."""
        t = self.timesteps(schedule)
        alpha, sigma = schedule.alpha_sigma(t)
        x = noise(0).double()
        x, t = x * torch.hypot(alpha[0], sigma[0]).item(), t.to(x.device)
        for i, (alpha_next, sigma_next) in enumerate(zip([*alpha[1:].tolist(), 1.0], [*sigma[1:].tolist(), 0.0], strict=True)):
            here = t[i].expand(len(x))
            at, target = schedule.alpha_sigma(here), model(x.to(dtype), here, cond)
            x = alpha_next * to_x0(prediction, target, x, *at) + sigma_next * to_eps(prediction, target, x, *at)
        return x
