"""Noise schedules: alpha and sigma of `x_t = alpha_t x0 + sigma_t eps` in float64, and the way from a uniform number to a timestep.

Nothing outside this file assumes a table: rectified flow is a continuous path with the same methods.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fasttrain.registry import Registry, shown

SCHEDULES = Registry("schedule")

# No beta comes nearer to 1: alpha would reach 0 and the inverse of the step would not exist (Nichol and Dhariwal 2021, section 3.2).
MAX_BETA = 0.999
MOST_TIMESTEPS = 100_000
MOST_TIMES = 1000  # larger than the images it was meant for is no schedule adapted to
# Half the distance from 1 to the next float64 above: 1 - _EDGE is the largest below 1.
_EDGE = 2.0**-53
_ROUNDING = 1e-9  # of a share times T: far more than float64's own, far less than a timestep


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

    def first(self, share: Tensor) -> Tensor:
        """The first t / T that is not below each share [N] float64 in [0, 1], as t [N]; a share of 1 gives T, which no timestep reaches."""

    def uniform(self, t: Tensor) -> Tensor:
        """The least u [N] float64 whose timestep is not below t [N], a `first`: the way back from `timestep`; 1 where there is none."""

    def nearest(self, edm_sigma: Tensor) -> Tensor:
        """The timestep whose sigma / alpha is nearest to each of `edm_sigma` [N] float64."""

    def spaced(self, steps: int) -> Tensor:
        """At most `steps` timesteps [N] spread evenly, from the last one down, on the host: where a sampler without its own grid goes."""


def _require_timesteps(given: int) -> None:
    if not 2 <= given <= MOST_TIMESTEPS:
        raise ValueError(f"num_timesteps must be at least 2 and at most {MOST_TIMESTEPS}, got {shown(given)}")


def _require_ratio(key: str, given: float) -> None:
    if not 1 / MOST_TIMES <= given <= MOST_TIMES:
        raise ValueError(f"{key} is a ratio of image sizes and must lie between 1/{MOST_TIMES} and {MOST_TIMES}, got {shown(given)}")


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
        rescale: r = s' / s for images r times as large as those the betas are meant for: every SNR becomes SNR / r^2, so that an image
            drowns in noise at the same timestep as its small version did                              [Berrada et al. 2024, Eq. 3]

    Raises:
        ValueError: fewer than 2 timesteps, or a rescale that is no ratio of sizes.
    """

    num_timesteps: int = 1000
    zero_terminal: bool = False
    rescale: float = 1.0

    def __post_init__(self) -> None:
        _require_timesteps(self.num_timesteps)
        _require_ratio("rescale", self.rescale)

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

    def first(self, share: Tensor) -> Tensor:
        """ceil(share T): int64 [N]. What rounding puts just above an integer is that integer."""
        return (share * self.num_timesteps - _ROUNDING).ceil().long()

    def uniform(self, t: Tensor) -> Tensor:
        """t / T: float64 [N], lifted by one rounding where floor(u T) would miss t."""
        u = t.double() / self.num_timesteps
        return torch.where((u * self.num_timesteps).long() < t, torch.nextafter(u, torch.ones_like(u)), u)

    def nearest(self, edm_sigma: Tensor) -> Tensor:
        """The timestep of the nearest sigma / alpha, int64 [N] (EDM's `round_sigma`: Karras et al. 2022, appendix C.3.4)."""
        return (self._edm_sigmas(edm_sigma.device) - edm_sigma[:, None]).abs().argmin(dim=1)

    def spaced(self, steps: int) -> Tensor:
        """round(i T / steps) - 1 for i = steps .. 1, each once: int64, ending in noise ("trailing": Lin et al. 2023, Table 2)."""
        ends = torch.arange(steps, 0, -1, dtype=torch.float64) * self.num_timesteps / steps
        return torch.unique_consecutive((ends.round().long() - 1).clamp(min=0))

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
            alpha = _ending_in_noise(alpha)
        sigma = (1 - alpha**2).sqrt()
        return _Table(alpha, sigma) if self.rescale == 1 else _rescaled(alpha, sigma, self.rescale)


def _rescaled(alpha: Tensor, sigma: Tensor, rescale: float) -> _Table:
    """alpha_bar' = alpha_bar / (r^2 + alpha_bar (1 - r^2)): SNR / r^2, still variance preserving [Berrada et al. 2024, Eq. 3]."""
    length = (alpha**2 + (rescale * sigma) ** 2).sqrt()
    return _Table(alpha / length, rescale * sigma / length)


def _ending_in_noise(alpha: Tensor) -> Tensor:
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


@SCHEDULES.register("flow")
@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path from data to noise, in continuous time [Liu et al. 2022, section 2.1; Esser et al. 2024, Eq. 13].

    alpha = 1 - t / T,  sigma = t / T,  t real in (0, T),     t = T s u / (1 + (s - 1) u) of a uniform number u  [Esser et al. 2024, Eq. 23]

    Neither end is ever drawn, so that SNR and weights stay finite.

    Args:
        num_timesteps: T, the scale on which the model is told the time.
        shift: s, which moves the draws and `spaced` towards noise. An SNR at u becomes SNR / s^2: for images s times as large it does
            what `rescale` does for the discrete schedules.

    Raises:
        ValueError: fewer than 2 timesteps, or a shift that is no ratio of sizes.
    """

    num_timesteps: int = 1000
    shift: float = 1.0

    # Past these a sampler would see nothing but noise, or nothing but data.
    edm_limits: ClassVar[tuple[float, float]] = (1e-3, 1e3)

    def __post_init__(self) -> None:
        _require_timesteps(self.num_timesteps)
        _require_ratio("shift", self.shift)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 - t / T and t / T, float64 [B]."""
        sigma = t.double() / self.num_timesteps
        return 1 - sigma, sigma

    def timestep(self, u: Tensor) -> Tensor:
        """T s u / (1 + (s - 1) u): float64 [B]."""
        return self._shifted(u).clamp(_EDGE, 1 - _EDGE) * self.num_timesteps

    def first(self, share: Tensor) -> Tensor:
        """share T: float64 [N]."""
        return share * self.num_timesteps

    def uniform(self, t: Tensor) -> Tensor:
        """p / (s - (s - 1) p) of p = t / T: float64 [N]."""
        place = t / self.num_timesteps
        return place / (self.shift - (self.shift - 1) * place)

    def nearest(self, edm_sigma: Tensor) -> Tensor:
        """The t with t / (T - t) = sigma / alpha: float64 [N]."""
        return self.num_timesteps * edm_sigma / (1 + edm_sigma)

    def spaced(self, steps: int) -> Tensor:
        """u = i / steps for i = steps .. 1, shifted, within `edm_limits`: float64."""
        least, most = self.nearest(torch.tensor(self.edm_limits, dtype=torch.float64))
        u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        return torch.unique_consecutive((self.num_timesteps * self._shifted(u)).clamp(least, most))

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)
