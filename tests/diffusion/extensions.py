"""A target and a schedule that the project does not have, to show what adding one takes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flow:
    """u = eps - x0 [Lipman et al. 2023]."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) = (-1, 1)."""
        return -torch.ones_like(alpha), torch.ones_like(sigma)


@dataclass(frozen=True)
class Straight:
    """x_t = (1 - t) x0 + t eps with continuous t: not variance preserving, and without a table."""

    num_timesteps: int = 1000
    edm_limits: tuple[float, float] = (1e-3, 1e3)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - t, t)."""
        return 1 - t.double(), t.double()

    def timestep(self, u: Tensor) -> Tensor:
        """u itself."""
        return u

    def nearest(self, edm_sigma: Tensor) -> Tensor:
        """The t with t / (1 - t) = sigma."""
        return edm_sigma / (1 + edm_sigma)
