"""The training objective: positions in, weighted loss out. The one place where schedule, target, weighting and timesteps meet."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fasttrain_kernels.dispatch import Kernels
from fasttrain_kernels.latent_noising import Posterior, latent_noising
from fasttrain_kernels.noising import noising
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform
from fasttrain_kernels.weighted_mse import weighted_mse
from torch import Tensor

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.prediction import PREDICTIONS, Prediction, weight_factor
from fasttrain.diffusion.schedule import SCHEDULES, Schedule
from fasttrain.diffusion.timestep_weights import placed
from fasttrain.diffusion.timesteps import OfPlaces, Timesteps, drawn_on
from fasttrain.diffusion.weighting import WEIGHTINGS, Weighting, signal_to_noise
from fasttrain.errors import UserError
from fasttrain.registry import Registry

Model = Callable[[Tensor, Tensor, Cond], Tensor | tuple[Tensor, Tensor]]
"""(x_t, t, cond) -> the predicted target, or it and a learned uncertainty u [B] (`uncertainty.py`)."""

# Weights of a continuous path that pass this near its ends have no bound; those of tables stay below (1e5 timesteps, rescaled: 1e19).
BOUND = 1e20


class Loss(NamedTuple):
    """What one micro-batch gives."""

    loss: Tensor  # [] fp32, what is minimised: the samples' mean of `weighted`, or of e^-u weighted + u; differentiable
    weighted: Tensor  # [B] fp32, each sample's weighted squared error
    mse: Tensor  # [B] fp32, each sample's unweighted squared error of the target
    by_range: Tensor  # [ranges, 2] fp32: for each range of timesteps the sum of mse and the count of samples
    t: Tensor  # [B] the timesteps drawn


class Objective:
    """The weighted denoising loss of a micro-batch, a pure function of (seed, position) and the data.

    loss = mean_b w(snr_b) factor_b mean_{c,h,w} (model(c x_t, t, cond) - target)^2        [Hang et al. 2023, Eq. 4-5 and appendix B]

    with `factor` from `prediction.weight_factor`, so that each weighting means the same for every target, and c its input scale. A model
    that tells an uncertainty u_b beside its prediction makes each sample's addend of it e^-u_b (addend) + u_b.

    Args:
        schedule, prediction, weighting, timesteps: components of this package.
        nothing: what the model is told where conditions are left out.
        label_drop: probability in [0, 1) of leaving out class and text (classifier-free guidance needs it).
        control_drop: the same of the controls, independently (separate guidance needs it).
        seed: [] int64, on the device of the data.
        ranges: how many equal ranges of timesteps the unweighted loss is told apart in.
        kernels: the implementation of each operation; default: auto for all.

    Raises:
        UserError: a combination that is undefined at some timestep, or dropout of what the model cannot do without.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        weighting: Weighting,
        timesteps: Timesteps | OfPlaces,
        *,
        nothing: Nothing,
        label_drop: float = 0.0,
        control_drop: float = 0.0,
        seed: Tensor,
        ranges: int = 1,
        kernels: Kernels | None = None,
    ):
        _require_defined(schedule, prediction, weighting)
        _require_droppable("label_drop", label_drop, "null label or empty caption", nothing.has_semantics)
        _require_droppable("control_drop", control_drop, "set of controls to leave out", nothing.controls)
        self.schedule = schedule
        self.prediction = prediction
        self.weighting = placed(weighting, schedule)
        self.timesteps = drawn_on(timesteps, schedule)
        self.nothing = nothing
        self.label_drop = label_drop
        self.control_drop = control_drop
        self.seed = seed
        self.ranges = ranges
        self.kernels = kernels or Kernels()

    def __call__(self, model: Model, clean: Tensor | Posterior, cond: Cond, position: Tensor, dtype: torch.dtype | None = None) -> Loss:
        """The loss of a micro-batch.

        Args:
            clean: x0 [B, C, H, W], or the stored posteriors that it is drawn from.
            cond: the samples' conditions.
            position: [B] int64, the draws' places in training.
            dtype: of the model's input; x0's by default.
        """
        t = self.schedule.timestep(self.timesteps.draw(self.seed, position, self.kernels.of("uniform")))
        alpha, sigma = self.schedule.alpha_sigma(t)
        x0_coef, eps_coef = self.prediction.coefficients(alpha, sigma)
        weight = target_weight(self.weighting, self.prediction, alpha, sigma)

        scale = self.prediction.input_scale(alpha, sigma)
        x0_share, eps_share = (alpha, sigma) if scale is None else (scale * alpha, scale * sigma)
        x_t, x0 = self._noised(clean, x0_share.float(), eps_share.float(), position, dtype)
        told = model(x_t, t, self._dropped(cond, position))
        pred, uncertainty = told if isinstance(told, tuple) else (told, None)
        loss, mse, by_range = weighted_mse(
            pred,
            x0,
            x0_coef.float(),
            eps_coef.float(),
            weight.float(),
            self.seed,
            position,
            timestep_range=torch.div(t * self.ranges, self.schedule.num_timesteps, rounding_mode="floor").long(),
            ranges=self.ranges,
            impl=self.kernels.of("weighted_mse"),
        )
        minimised = loss if uncertainty is None else loss * torch.exp(-uncertainty) + uncertainty
        return Loss(minimised.mean(), loss.detach(), mse, by_range, t)

    def _noised(
        self, clean: Tensor | Posterior, alpha: Tensor, sigma: Tensor, position: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """(alpha x0 + sigma eps in `dtype`, x0)."""
        if isinstance(clean, Tensor):
            return noising(clean, alpha, sigma, self.seed, position, dtype=dtype, impl=self.kernels.of("noising")), clean
        stored, shift, scale, flip = clean
        draw, impl = (self.seed, position), self.kernels.of("latent_noising")
        return latent_noising(stored, shift, scale, alpha, sigma, *draw, flip=flip, dtype=dtype or torch.float32, impl=impl)

    def _dropped(self, cond: Cond, position: Tensor) -> Cond:
        if self.label_drop:
            cond = self.nothing.instead_of_semantics(cond, self._chosen(position, Purpose.LABEL_DROP, self.label_drop))
        if self.control_drop:
            cond = self.nothing.instead_of_controls(cond, self._chosen(position, Purpose.CONTROL_DROP, self.control_drop))
        return cond

    def _chosen(self, position: Tensor, purpose: Purpose, share: float) -> Tensor:
        return uniform(self.seed, position, purpose, impl=self.kernels.of("uniform")) < share


def target_weight(weighting: Weighting, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The weight on the squared error of the target: w(snr) times the target's factor; float64 [B]."""
    return weighting(signal_to_noise(alpha, sigma)) * weight_factor(prediction, alpha, sigma)


def _require_defined(schedule: Schedule, prediction: Prediction, weighting: Weighting) -> None:
    """Looks along the whole schedule, both ends included: u = 0 and the largest float64 below 1.

    Towards an end of a continuous path a target may lose sight of x0 (eps, where no data is left): that is fine where its weight stays
    bounded.
    """
    u = torch.linspace(0, 1 - 2.0**-53, 4096, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(schedule.timestep(u))
    if not weight_factor(prediction, alpha, sigma).isfinite().all():
        raise UserError(
            f"prediction {_name(PREDICTIONS, prediction)} is undefined under schedule {_name(SCHEDULES, schedule)}, whose last timestep "
            "holds no data (zero terminal SNR): set prediction to v or x0, or the schedule's zero_terminal to false"
        )
    if not (target_weight(placed(weighting, schedule), prediction, alpha, sigma) < BOUND).all():
        raise UserError(
            f"weighting {_name(WEIGHTINGS, weighting)} grows without bound for prediction {_name(PREDICTIONS, prediction)} "
            f"under schedule {_name(SCHEDULES, schedule)}: set weighting to min_snr, which is bounded everywhere"
        )


def _require_droppable(key: str, share: float, what: str, there: bool) -> None:
    if not 0 <= share < 1:
        raise UserError(f"{key} must lie in [0, 1), got {share}")
    if share > 0 and not there:
        raise UserError(f"{key} {share} needs a model with a {what}, and this one has none: set {key} to 0")


def _name(registry: Registry, component: Any) -> str:
    return repr(registry.spec(component)["name"])
