"""Noise schedules: alpha and sigma of `x_t = alpha_t x0 + sigma_t eps` in float64, and the way from a uniform number to a timestep.

Nothing outside this file assumes a table: a continuous path (rectified flow: alpha = 1 - t, sigma = t) is one more class
with the methods of `Schedule`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fasttrain.registry import Registry, shown

SCHEDULES = Registry("schedule")

# No beta comes nearer to 1: alpha would reach 0 and the inverse of the step would not exist (Nichol and Dhariwal 2021, section 3.2).
MAX_BETA = 0.999
MOST_TIMESTEPS = 100_000


class Schedule(Protocol):
    """What the objective and the samplers ask of a schedule."""

    @property
    def num_timesteps(self) -> int:
        """T: how many timesteps a model tells apart."""

    @property
    def edm_limits(self) -> tuple[float, float]:
        """Smallest and largest finite sigma / alpha: the ends of a sampler's grid."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scale of the data and of the noise at t [B]: two float64 [B]."""

    def timestep(self, u: Tensor) -> Tensor:
        """The timestep of a uniform number u [B] float64 in [0, 1); increasing in u."""

    def nearest(self, edm_sigma: Tensor) -> Tensor:
        """The timestep whose sigma / alpha is nearest to each of `edm_sigma` [N] float64."""


class _Table(NamedTuple):
    alpha: Tensor  # [T] float64
    sigma: Tensor  # [T] float64


@dataclass(frozen=True)
class DiscreteSchedule(ABC):
    """A variance-preserving schedule of T timesteps, given by its betas.

    alpha_bar[t] = prod_{i <= t} (1 - beta[i]),  alpha = sqrt(alpha_bar),  sigma = sqrt(1 - alpha_bar)     [Ho et al. 2020, Eq. 4]

    Args:
        num_timesteps: T, at least 2.
        zero_terminal: shift and scale alpha so that the last timestep holds no data (SNR = 0) and the first stays as it is.

    Raises:
        ValueError: fewer than 2 timesteps.
    """

    num_timesteps: int = 1000
    zero_terminal: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_timesteps <= MOST_TIMESTEPS:
            raise ValueError(f"num_timesteps must be at least 2 and at most {MOST_TIMESTEPS}, got {shown(self.num_timesteps)}")

    @abstractmethod
    def betas(self) -> Tensor:
        """The noise variance added at each timestep: [T] float64."""

    @cached_property
    def edm_limits(self) -> tuple[float, float]:
        """Smallest and largest finite sigma / alpha."""
        ratio = self._edm_sigmas(torch.device("cpu"))
        finite = ratio[torch.isfinite(ratio)]
        return finite.min().item(), finite.max().item()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, float64 [B], for t [B] int64 in [0, T)."""
        table = self._on(t.device)
        return table.alpha[t], table.sigma[t]

    def timestep(self, u: Tensor) -> Tensor:
        """floor(u T): int64 [B] for u [B] float64 in [0, 1)."""
        return (u * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def nearest(self, edm_sigma: Tensor) -> Tensor:
        """The timestep of the nearest sigma / alpha, int64 [N] (EDM's `round_sigma`: Karras et al. 2022, appendix C.3.4)."""
        return (self._edm_sigmas(edm_sigma.device) - edm_sigma[:, None]).abs().argmin(dim=1)

    def _edm_sigmas(self, device: torch.device) -> Tensor:
        table = self._on(device)
        return table.sigma / table.alpha

    def _on(self, device: torch.device) -> _Table:
        # Copied to a device once: a copy per call would wait for the host.
        if device not in self._tables:
            self._tables[device] = _Table(*(column.to(device) for column in self._table))
        return self._tables[device]

    @cached_property
    def _tables(self) -> dict[torch.device, _Table]:
        return {}

    @cached_property
    def _table(self) -> _Table:
        alpha = (1 - self.betas()).cumprod(0).sqrt()
        if self.zero_terminal:
            alpha = _rescaled(alpha)
        return _Table(alpha, (1 - alpha**2).sqrt())


def _rescaled(alpha: Tensor) -> Tensor:
    """Zero terminal SNR: alpha' = (alpha - alpha_T) alpha_0 / (alpha_0 - alpha_T) [Lin et al. 2023, Algorithm 1]."""
    first, last = alpha[0], alpha[-1]
    return (alpha - last) * first / (first - last)


@SCHEDULES.register("cosine")
@dataclass(frozen=True)
class Cosine(DiscreteSchedule):
    """beta_i = min(1 - f((i + 1) / T) / f(i / T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 * pi / 2) [Nichol and Dhariwal 2021, Eq. 17]."""

    def betas(self) -> Tensor:
        """The noise variance added at each timestep: [T] float64."""
        u = torch.arange(self.num_timesteps + 1, dtype=torch.float64) / self.num_timesteps
        f = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)


@SCHEDULES.register("linear")
@dataclass(frozen=True)
class Linear(DiscreteSchedule):
    """beta linear from 1e-4 to 0.02 [Ho et al. 2020, section 4]; both times 1000 / T, so that any T ends near the same SNR."""

    def betas(self) -> Tensor:
        """The noise variance added at each timestep: [T] float64."""
        return _scaled_to(self.num_timesteps, torch.linspace(1e-4, 0.02, self.num_timesteps, dtype=torch.float64))


@SCHEDULES.register("scaled_linear")
@dataclass(frozen=True)
class ScaledLinear(DiscreteSchedule):
    """sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012): Stable Diffusion's [Rombach et al. 2022]; 1000 / T as in `linear`."""

    def betas(self) -> Tensor:
        """The noise variance added at each timestep: [T] float64."""
        root = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), self.num_timesteps, dtype=torch.float64)
        return _scaled_to(self.num_timesteps, root**2)


def _scaled_to(num_timesteps: int, betas_of_1000: Tensor) -> Tensor:
    return (betas_of_1000 * (1000 / num_timesteps)).clamp(max=MAX_BETA)
