"""Weightings: how much the squared error of x0 counts at a signal-to-noise ratio.

Each is declared once, on x0; `prediction.weight_factor` converts it for the target that the network predicts. All are functions of
snr = alpha^2 / sigma^2 (squared), float64, defined at snr = 0 and at snr = inf.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fasttrain.registry import Registry

WEIGHTINGS = Registry("weighting")
LEAST_DEVIATION = 1e-6


class Weighting(Protocol):
    """A weight on the squared x0 error."""

    def __call__(self, snr: Tensor) -> Tensor:
        """w(snr) >= 0: the shape and dtype of snr."""


def signal_to_noise(alpha: Tensor, sigma: Tensor) -> Tensor:
    """snr = alpha^2 / sigma^2; inf where there is no noise."""
    return (alpha / sigma) ** 2


def require_sigma_data(given: float) -> None:
    """Raises ValueError unless it can be a standard deviation of data."""
    if not LEAST_DEVIATION <= given <= 1 / LEAST_DEVIATION:
        raise ValueError(f"sigma_data is the data's standard deviation and must lie between 1e-6 and 1e6, got {given}")


def _require_positive(gamma: float) -> None:
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")


@WEIGHTINGS.register("const")
@dataclass(frozen=True)
class Const:
    """w = 1 [Hang et al. 2023, section 3.4]."""

    def __call__(self, snr: Tensor) -> Tensor:
        """1 at every snr."""
        return torch.ones_like(snr)


@WEIGHTINGS.register("snr")
@dataclass(frozen=True)
class Snr:
    """w = snr: equal weights on the error of eps [Hang et al. 2023, section 3.4]; unbounded as sigma -> 0."""

    def __call__(self, snr: Tensor) -> Tensor:
        """snr itself."""
        return snr


@WEIGHTINGS.register("max_snr")
@dataclass(frozen=True)
class MaxSnr:
    """w = max(snr, gamma), gamma = 1: the truncated SNR weighting [Salimans and Ho 2022, section 4; Hang et al. 2023, section 3.4]."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self.gamma)

    def __call__(self, snr: Tensor) -> Tensor:
        """max(snr, gamma)."""
        return snr.clamp(min=self.gamma)


@WEIGHTINGS.register("min_snr")
@dataclass(frozen=True)
class MinSnr:
    """w = min(snr, gamma), gamma = 5: no task's weight grows past gamma [Hang et al. 2023, section 3.4]."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _require_positive(self.gamma)

    def __call__(self, snr: Tensor) -> Tensor:
        """min(snr, gamma)."""
        return snr.clamp(max=self.gamma)


@WEIGHTINGS.register("clamped_snr")
@dataclass(frozen=True)
class ClampedSnr:
    """w = max(floor, min(snr, gamma)), floor = 1, gamma = 5: min-SNR that keeps const's weight where noise prevails (our own).

    There min-SNR's weight goes to 0 with snr, and so does what the network learns of classes and layout in its first steps.
    """

    floor: float = 1.0
    gamma: float = 5.0

    def __post_init__(self) -> None:
        _require_positive(self.gamma)
        if not 0 < self.floor < self.gamma:
            raise ValueError(f"floor must lie between 0 and gamma ({self.gamma}), got {self.floor}")

    def __call__(self, snr: Tensor) -> Tensor:
        """max(floor, min(snr, gamma))."""
        return snr.clamp(min=self.floor, max=self.gamma)


@WEIGHTINGS.register("soft_min_snr")
@dataclass(frozen=True)
class SoftMinSnr:
    """w = snr gamma / (snr + gamma), gamma = 5: min-SNR without the kink [Crowson et al. 2024, section 4.5]."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _require_positive(self.gamma)

    def __call__(self, snr: Tensor) -> Tensor:
        """gamma / (1 + gamma / snr): the same quotient, written so that both limits (0 and gamma) come out."""
        return self.gamma / (1 + self.gamma / snr)


@WEIGHTINGS.register("flow")
@dataclass(frozen=True)
class Flow:
    """w = (1 + alpha / sigma)^2: equal weights on the error of eps - x0, the plain loss of rectified flow [Esser et al. 2024, section 2].

    From w sigma^2 / (alpha + sigma)^2 = 1; unbounded as sigma -> 0.
    """

    def __call__(self, snr: Tensor) -> Tensor:
        """(1 + sqrt(snr))^2."""
        return (1 + snr.sqrt()) ** 2


@WEIGHTINGS.register("p2")
@dataclass(frozen=True)
class P2:
    """w = snr / (k + snr)^gamma, k = gamma = 1: less weight on the last, imperceptible details [Choi et al. 2022, "P2", Eq. 8].

    The paper states it on the error of eps, as 1 / (k + snr)^gamma; gamma = 0 is equal weights there.
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.k < math.inf:
            raise ValueError(f"k must be positive and finite, got {self.k}")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be 0 or more and finite, got {self.gamma}")

    def __call__(self, snr: Tensor) -> Tensor:
        """(k + snr)^(1 - gamma) / (1 + k / snr): the same quotient, written so that both limits come out."""
        return (self.k + snr) ** (1 - self.gamma) / (1 + self.k / snr)


@WEIGHTINGS.register("edm")
@dataclass(frozen=True)
class Edm:
    """w = snr + 1 / sigma_data^2: EDM's (s^2 + sigma_data^2) / (s sigma_data)^2 at s = sigma / alpha [Karras et al. 2022, Table 1].

    With a gamma it is multiplied by min(snr, gamma) / snr: Min-SNR on EDM [Hang et al. 2023, supplement 4.1.1]. The supplement does not
    say which SNR: taken is the paper's own, alpha^2 / sigma^2 = 1 / s^2, not sigma_data^2 / s^2. So gamma = 5 is the noise level where
    every other weighting's gamma = 5 is.

    Args:
        sigma_data: the data's standard deviation: the same as of prediction `edm`, on whose error this weight is 1.
        gamma: 5 in the supplement; None: EDM's own weighting.
    """

    sigma_data: float = 0.5
    gamma: float | None = None

    def __post_init__(self) -> None:
        require_sigma_data(self.sigma_data)
        if self.gamma is not None:
            _require_positive(self.gamma)

    def __call__(self, snr: Tensor) -> Tensor:
        """snr + 1 / sigma_data^2, or min(snr, gamma) + min(1, gamma / snr) / sigma_data^2."""
        if self.gamma is None:
            return snr + self.sigma_data**-2
        return snr.clamp(max=self.gamma) + (self.gamma / snr).clamp(max=1) * self.sigma_data**-2
