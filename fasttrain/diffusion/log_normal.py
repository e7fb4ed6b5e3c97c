"""EDM's noise levels as a schedule: a continuous path whose log sigma is normally distributed."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fasttrain.diffusion.schedule import MOST_TIMESTEPS, SCHEDULES
from fasttrain.registry import shown

FURTHEST_LOG = 20.0
_EDGE = 2.0**-53


@SCHEDULES.register("edm")
@dataclass(frozen=True)
class LogNormal:
    """sigma / alpha = s with ln s ~ N(mean, std^2), told to the model in proportion to ln s [Karras et al. 2022, Table 1].

    s = exp(mean + std z),  z = inverse normal distribution function of the uniform number u,  t = T ln(s / least) / ln(most / least)

    EDM adds noise of deviation s to the data; here x_t is that divided by sqrt(1 + s^2), which is variance preserving and has the same
    SNR, so that every target, weighting and sampler means on it what it means elsewhere. EDM tells its model c_noise = ln(s) / 4: t is a
    linear function of that, on the scale that the models' embeddings are made for. The 2 draws in 100,000 that fall outside
    [0.002, 80] at the default mean and std, the ends of EDM's own sampling, are moved to the end.

    Args:
        num_timesteps: T, the scale on which the model is told the time.
        mean, std: of ln s. `timesteps` decides only which uniform numbers these are made of: `uniform` or `stratified` is EDM's.

    Raises:
        ValueError: fewer than 2 timesteps, a mean beyond use, or a std that is not positive.
    """

    num_timesteps: int = 1000
    mean: float = -1.2
    std: float = 1.2

    edm_limits: ClassVar[tuple[float, float]] = (0.002, 80.0)

    def __post_init__(self) -> None:
        if not 2 <= self.num_timesteps <= MOST_TIMESTEPS:
            raise ValueError(f"num_timesteps must be at least 2 and at most {MOST_TIMESTEPS}, got {shown(self.num_timesteps)}")
        if not abs(self.mean) <= FURTHEST_LOG:
            raise ValueError(f"mean must lie between -{FURTHEST_LOG:g} and {FURTHEST_LOG:g}, got {shown(self.mean)}")
        if not 0 < self.std <= FURTHEST_LOG:
            raise ValueError(f"std must be positive and at most {FURTHEST_LOG:g}, got {shown(self.std)}")

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 / sqrt(1 + s^2) and s / sqrt(1 + s^2), float64 [B]."""
        least, span = self._log_scale
        s = torch.exp(least + span * (t.double() / self.num_timesteps))
        length = torch.sqrt(1 + s**2)
        return 1 / length, s / length

    def timestep(self, u: Tensor) -> Tensor:
        """t of s = exp(mean + std z): float64 [B], in (0, T)."""
        least, span = self._log_scale
        place = (self.mean + self.std * torch.special.ndtri(u) - least) / span
        return place.clamp(_EDGE, 1 - _EDGE) * self.num_timesteps

    def first(self, share: Tensor) -> Tensor:
        """share T: float64 [N]."""
        return share * self.num_timesteps

    def uniform(self, t: Tensor) -> Tensor:
        """Phi((ln s - mean) / std): float64 [N]; 0 and 1 at the ends, to which the draws beyond them are moved."""
        least, span = self._log_scale
        place = t / self.num_timesteps
        u = torch.special.ndtr((least + span * place - self.mean) / self.std)
        return torch.where(place <= 0, 0.0, torch.where(place >= 1, 1.0, u))

    def nearest(self, edm_sigma: Tensor) -> Tensor:
        """The t of s: float64 [N]."""
        least, span = self._log_scale
        return self.num_timesteps * ((edm_sigma.log() - least) / span).clamp(0, 1)

    def spaced(self, steps: int) -> Tensor:
        """T i / steps for i = steps .. 1, evenly in ln s: float64."""
        return self.num_timesteps * torch.arange(steps, 0, -1, dtype=torch.float64) / steps

    @property
    def _log_scale(self) -> tuple[float, float]:
        """ln least, and ln(most / least)."""
        least, most = self.edm_limits
        return math.log(least), math.log(most / least)
