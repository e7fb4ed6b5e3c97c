"""EDM's preconditioning as a target: what the network F predicts has unit variance at every noise level, and so has what it sees."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.diffusion.prediction import PREDICTIONS
from fasttrain.diffusion.weighting import require_sigma_data


@PREDICTIONS.register("edm")
@dataclass(frozen=True)
class Preconditioned:
    """F of D(x; s) = c_skip x + c_out F(c_in x), D the denoised data [Karras et al. 2022, Eq. 7 and Table 1], on any path.

    EDM's x = x0 + s eps is x_t / alpha with s = sigma / alpha. Its coefficients, with d = sigma_data and r = sqrt(sigma^2 + d^2 alpha^2):

        c_skip = d^2 / (s^2 + d^2),   c_out = s d / sqrt(s^2 + d^2),   c_in = 1 / sqrt(s^2 + d^2) = alpha / r

    Solved for F at D = x0, with x = x0 + s eps:

        F = (x0 - c_skip x) / c_out = ((1 - c_skip) x0 - c_skip s eps) / c_out = a x0 + b eps,   a = sigma / (d r),  b = -d alpha / r

    For data of deviation d, a^2 d^2 + b^2 = 1. The network sees c_in x = x_t / r, whose variance is (alpha^2 d^2 + sigma^2) / r^2 = 1.
    The weight on x0's error that is 1 on F's is r^2 / (d sigma)^2 = 1 / d^2 + 1 / s^2: the weighting `edm`. At d = 1 on a
    variance-preserving path F is -v.

    Args:
        sigma_data: d, the data's standard deviation; 0.5 is EDM's for pixels in [-1, 1]. Latents normalised by channel have 1.

    Raises:
        ValueError: a sigma_data that is not positive and finite.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require_sigma_data(self.sigma_data)

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) = (sigma / (d r), -d alpha / r)."""
        r = self._deviation(alpha, sigma)
        return sigma / (self.sigma_data * r), -self.sigma_data * alpha / r

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1 / r, by which x_t is multiplied."""
        return 1 / self._deviation(alpha, sigma)

    def _deviation(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.sqrt(sigma**2 + self.sigma_data**2 * alpha**2)
