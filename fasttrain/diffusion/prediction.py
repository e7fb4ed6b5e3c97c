"""What the network predicts. A target is declared by two coefficients; its weight, its way to x0 and its way to eps follow.

Every target is linear in the data and the noise:

    target = a x0 + b eps,    x_t = alpha x0 + sigma eps,    D = a sigma - b alpha.

Two linear equations in two unknowns, so for any alpha and sigma (variance preserving or not), eliminating eps and then x0:

    x0 = (sigma target - b x_t) / D,    eps = (a x_t - alpha target) / D.

At a given x_t an error d in the target is an error sigma d / D in x0. So the squared error in x0, weighted by w, is the squared error
in the target, weighted by w sigma^2 / D^2 (Hang et al. 2023, appendix B, is the case alpha^2 + sigma^2 = 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fasttrain.diffusion.schedule import Schedule
from fasttrain.registry import Registry

Conditions = TypeVar("Conditions")

PREDICTIONS = Registry("prediction")


class Prediction(Protocol):
    """A target a x0 + b eps."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at alpha and sigma: two tensors of their shape and dtype."""

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """c of alpha's shape and dtype: the network is given c x_t. None: 1."""


class Unscaled:
    """A target whose network is given x_t as it is."""

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> None:
        """1."""
        return


@PREDICTIONS.register("x0")
@dataclass(frozen=True)
class X0(Unscaled):
    """The data: (1, 0)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) = (1, 0)."""
        return torch.ones_like(alpha), torch.zeros_like(sigma)


@PREDICTIONS.register("eps")
@dataclass(frozen=True)
class Eps(Unscaled):
    """The noise: (0, 1)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) = (0, 1)."""
        return torch.zeros_like(alpha), torch.ones_like(sigma)


@PREDICTIONS.register("v")
@dataclass(frozen=True)
class V(Unscaled):
    """The velocity v = alpha eps - sigma x0 [Salimans and Ho 2022, appendix D]: (-sigma, alpha)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) = (-sigma, alpha)."""
        return -sigma, alpha


@PREDICTIONS.register("flow")
@dataclass(frozen=True)
class Flow(Unscaled):
    """The velocity of the straight path, eps - x0 [Liu et al. 2022, Eq. 1; Esser et al. 2024]: (-1, 1). LightningDiT's is its negative."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) = (-1, 1)."""
        return -torch.ones_like(alpha), torch.ones_like(sigma)


def given_scaled(
    model: Callable[[Tensor, Tensor, Conditions], Tensor], schedule: Schedule, prediction: Prediction
) -> Callable[[Tensor, Tensor, Conditions], Tensor]:
    """(x_t, t, conditions) -> the network's output, which is given the target's input scale times x_t, as in training."""

    def scaled(x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        scale = prediction.input_scale(*schedule.alpha_sigma(t))
        return model(x_t if scale is None else (x_t * _along(scale, x_t)).to(x_t.dtype), t, cond)

    return scaled


def weight_factor(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """sigma^2 / D^2: turns a weight on the squared x0 error into the weight on the squared error of the target.

    x0: 1; eps: sigma^2 / alpha^2; v: sigma^2 / (alpha^2 + sigma^2)^2; eps - x0: sigma^2 / (alpha + sigma)^2.

    Args:
        alpha, sigma: float64, any one shape.

    Returns:
        The same shape and dtype; inf where the target does not determine x0 (eps at alpha = 0).
    """
    a, b = prediction.coefficients(alpha, sigma)
    # Without noise in the target the factor is 1 / a^2 also at sigma = 0, where the quotient would be 0 / 0.
    return torch.where(b == 0, 1 / a, sigma / (a * sigma - b * alpha)) ** 2


def to_x0(prediction: Prediction, predicted: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The data that a predicted target implies: (sigma target - b x_t) / D.

    Args:
        predicted, x_t: [B, ...].
        alpha, sigma: [B] float64.

    Returns:
        [B, ...] float64.
    """
    a, b = prediction.coefficients(alpha, sigma)
    implied = _along(sigma, x_t) * predicted.double() - _along(b, x_t) * x_t.double()
    # The same limit as in `weight_factor`: a pure x0 target needs no division by sigma.
    return torch.where(_along(b == 0, x_t), predicted.double() / _along(a, x_t), implied / _along(a * sigma - b * alpha, x_t))


def to_eps(prediction: Prediction, predicted: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a predicted target implies: (a x_t - alpha target) / D; shapes and dtypes as in `to_x0`."""
    a, b = prediction.coefficients(alpha, sigma)
    implied = _along(a, x_t) * x_t.double() - _along(alpha, x_t) * predicted.double()
    # A pure eps target needs no division by alpha.
    return torch.where(_along(a == 0, x_t), predicted.double() / _along(b, x_t), implied / _along(a * sigma - b * alpha, x_t))


def _along(per_sample: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to broadcast along the samples of `like`."""
    return per_sample.reshape(-1, *[1] * (like.dim() - 1))
