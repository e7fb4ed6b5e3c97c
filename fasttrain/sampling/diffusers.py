"""DDIM, DPM-Solver++ and DDPM through diffusers' schedulers, for every target and schedule: the only file here that imports diffusers.

A scheduler is given only the N timesteps that are visited, as a chain of its own 0 .. N - 1 (which numbers of steps divide T is then
nobody's concern), their alpha_bar in float64, and x0 as the "sample" that the model predicts. Every path is a variance-preserving one
with its x_t stretched by sqrt(alpha^2 + sigma^2), so rectified flow and a zero terminal SNR are served as well.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttrain.cond import Cond
from fasttrain.diffusion.prediction import Prediction, to_x0
from fasttrain.diffusion.schedule import Schedule
from fasttrain.errors import UserError
from fasttrain.sampling.sampler import SAMPLERS, Model, Noise
from fasttrain.sampling.spacing import Spaced

# Where the SNR is 0, diffusers' formulas would take 0 / 0, or the root of a rounding error: a millionth of data stands in for none.
LEAST_ALPHA_BAR = 1e-12


@dataclass(frozen=True)
class Scheduled(Spaced):
    """A sampler that is one of diffusers' schedulers: one evaluation at each timestep of the spacing, from the last down to x0."""

    def require(self) -> None:
        """Raises UserError where diffusers is not installed."""
        _diffusers()

    def __call__(self, model: Model, schedule: Schedule, prediction: Prediction, noise: Noise, cond: Cond, dtype: torch.dtype) -> Tensor:
        """x0 [B, C, H, W] float64 for `cond` of B."""
        t = self.timesteps(schedule)
        alpha, sigma = schedule.alpha_sigma(t)
        stretches = torch.hypot(alpha, sigma)
        scheduler = self.scheduler(_diffusers(), _chain((alpha / stretches) ** 2))
        x = noise(0).double()
        t = t.to(x.device)
        for i, stretch in enumerate(stretches.tolist()):
            here, x_t = t[i].expand(len(x)), stretch * x
            x0 = to_x0(prediction, model(x_t.to(dtype), here, cond), x_t, *schedule.alpha_sigma(here))
            x = self.step(scheduler, x0, len(t) - 1 - i, x, noise, i)
        return x

    @abstractmethod
    def scheduler(self, diffusers: ModuleType, chain: "_Chain") -> Any:
        """diffusers' scheduler for this chain."""

    def step(self, scheduler: Any, x0: Tensor, place: int, x: Tensor, noise: Noise, number: int) -> Tensor:
        """x one place further down the chain; `number` counts the steps from 0."""
        return scheduler.step(x0, place, x).prev_sample


@SAMPLERS.register("ddim")
@dataclass(frozen=True)
class Ddim(Scheduled):
    """DDIM [Song et al. 2021, Eq. 12]: deterministic at eta = 0, and then the same as `euler`.

    Args:
        steps: N. The conditioning paper takes 250 for its scores and 50 for its pictures.
        spacing: as Spaced.
        eta: share of DDPM's noise that each step adds, drawn by (seed, sample number, step).

    Raises:
        ValueError: as Spaced; or eta outside [0, 1].
    """

    steps: int = 50
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def scheduler(self, diffusers: ModuleType, chain: "_Chain") -> Any:
        return chain.given_to(diffusers.DDIMScheduler, clip_sample=False)

    def step(self, scheduler: Any, x0: Tensor, place: int, x: Tensor, noise: Noise, number: int) -> Tensor:
        fresh = noise(number + 1).double() if self.eta else None
        return scheduler.step(x0, place, x, eta=self.eta, variance_noise=fresh).prev_sample


@SAMPLERS.register("ddpm")
@dataclass(frozen=True)
class Ddpm(Scheduled):
    """Ancestral sampling with the posterior's variance [Ho et al. 2020, Algorithm 2 and Eq. 7].

    It is DDIM at eta = 1 [Song et al. 2021, section 4.1] and taken as that: diffusers' DDPMScheduler draws its own noise and takes none,
    and ours is a function of (seed, sample number, step).

    Args:
        steps: N.
        spacing: as Spaced.
    """

    steps: int = 250

    def scheduler(self, diffusers: ModuleType, chain: "_Chain") -> Any:
        return chain.given_to(diffusers.DDIMScheduler, clip_sample=False)

    def step(self, scheduler: Any, x0: Tensor, place: int, x: Tensor, noise: Noise, number: int) -> Tensor:
        return scheduler.step(x0, place, x, eta=1.0, variance_noise=noise(number + 1).double()).prev_sample


@SAMPLERS.register("dpm_solver")
@dataclass(frozen=True)
class DpmSolver(Scheduled):
    """DPM-Solver++, multistep [Lu et al. 2022, "DPM-Solver++", Algorithm 2 at order 2]: second order at one evaluation a step.

    The first step is of first order and, at order 3, the second of second, for want of history. The last one is of first order at any N:
    it ends in x0 as the model sees it there, so it should leave from little noise. At order 3 with fewer than 15 timesteps the one before
    it is of second order. diffusers keeps its sigmas and state in float32.

    With 10, 20 and 50 steps at order 2 samples of normal data have its deviation (0.5) within 4.5 %, 2 % and 0.6 % on every schedule of
    Spaced's table; from trailing timesteps it is up to 42 %, 26 % and 12 % too small.

    Args:
        steps: N.
        spacing: as Spaced.
        order: 1, 2 or 3. 3 asks for 20 steps: with 10 it makes up to a fifth too much of fine detail.

    Raises:
        ValueError: as Spaced; or another order.
    """

    steps: int = 20
    spacing: str = field(default="log_snr", kw_only=True)
    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order}")

    def scheduler(self, diffusers: ModuleType, chain: "_Chain") -> Any:
        return chain.given_to(diffusers.DPMSolverMultistepScheduler, solver_order=self.order)


@dataclass(frozen=True, eq=False)
class _Chain:
    """A chain of noise levels: alpha_bar [N] float64 on the host, decreasing."""

    alpha_bar: Tensor

    def given_to(self, kind: type, **options: Any) -> Any:
        """A scheduler of this kind that walks the whole chain."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        betas = (1 - self.alpha_bar / before).tolist()
        length = len(betas)
        scheduler = kind(num_train_timesteps=length, trained_betas=betas, prediction_type="sample", timestep_spacing="trailing", **options)
        scheduler.alphas_cumprod = self.alpha_bar  # its own went through float32, which loses three digits of the least noise
        scheduler.set_timesteps(length)
        return scheduler


def _chain(alpha_bar: Tensor) -> _Chain:
    """The chain of timesteps visited from much noise to little."""
    return _Chain(alpha_bar.flip(0).clamp(min=LEAST_ALPHA_BAR))


def _diffusers() -> ModuleType:
    """Imported when it is needed: it takes seconds."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"samplers ddim, dpm_solver and ddpm need diffusers ({error}): pip install 'fasttrain[latents]', or take heun or euler"
        ) from None
    return diffusers
