"""The Pareto view of weightings: how short a step they leave of the gradients of all timestep ranges together.

    f(w) = |sum_k w_k g_k|^2 + lambda sum_k w_k^2 = w (G + lambda I) w,    w >= 0, sum_k w_k = 1        [Hang et al. 2023, Eq. 10-13]

with g_k the gradient of range k's mean x0 loss and G its Gram matrix. The paper compares weightings by f (figure 4) without saying how it
makes their sums equal; here each is divided by its sum, as Eq. 10 and the softmax of Eq. 12 have it. Nor does it give lambda: here it
counts in units of the mean |g_k|^2, so that it means the same for every network.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fasttrain.diffusion.schedule import Schedule
from fasttrain.diffusion.weighting import Weighting, signal_to_noise


def normalised(gram: Tensor) -> Tensor:
    """The Gram matrix in units of the mean squared gradient: its diagonal has mean 1."""
    return gram / gram.diagonal().mean()


def regularised(gram: Tensor, regularisation: float) -> Tensor:
    """G + lambda I, whose quadratic form is Eq. 11. Raises ValueError for a negative lambda."""
    if not 0 <= regularisation < float("inf"):
        raise ValueError(f"lambda must not be negative, got {regularisation}")
    return gram + regularisation * torch.eye(len(gram), dtype=gram.dtype)


def objective(gram: Tensor, weights: Tensor, regularisation: float) -> float:
    """Eq. 11 at weights [K] float64, which are divided by their sum."""
    w = weights / weights.sum()
    return float(w @ regularised(gram, regularisation) @ w)


def range_weights(weighting: Weighting, schedule: Schedule, ranges: int) -> Tensor:
    """What a weighting gives to each of `ranges` equal ranges of timesteps, as a share of all: [K] float64, of sum 1.

    The mean over the range's timesteps. Where a weighting varies much within a range (snr near t = 0), that is coarse: more ranges tell it
    finer.
    """
    points = schedule.num_timesteps  # in each range: over all of them each timestep is met `ranges` times
    u = (torch.arange(ranges * points, dtype=torch.float64) + 0.5) / (ranges * points)
    weight = weighting(signal_to_noise(*schedule.alpha_sigma(schedule.timestep(u))))
    mean = weight.view(ranges, points).mean(dim=1)
    return mean / mean.sum()


def compare(gram: Tensor, shares: Mapping[str, Tensor], best: Tensor, regularisation: float) -> dict[str, dict[str, float]]:
    """Each weighting's objective, how many times the least one it is, and the distance of its weights from the best ones.

    Args:
        gram: [K, K] float64.
        shares: [K] by name.
        best: weights [K] at which the objective is least.
    """
    least = objective(gram, best, regularisation)
    return {
        name: {
            "objective": (value := objective(gram, share, regularisation)),
            "times_least": value / least if least > 0 else float("inf"),
            "distance": float((share / share.sum() - best).abs().sum()) / 2,
        }
        for name, share in shares.items()
    }
