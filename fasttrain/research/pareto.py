"""The Pareto view of weightings: how short a step they leave of the gradients of all timestep ranges together.

    f(w) = |sum_k w_k g_k|^2 + lambda sum_k w_k^2 = w (G + lambda I) w,    w >= 0, sum_k w_k = 1        [Hang et al. 2023, Eq. 10-13]

with g_k the gradient of range k's mean x0 loss and G its Gram matrix. The paper compares weightings by f (figure 4) without saying how it
makes their sums equal; here each is divided by its sum, as Eq. 10 and the softmax of Eq. 12 have it. Nor does it give lambda: here it
counts in units of the mean |g_k|^2, so that it means the same for every network.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from fasttrain.diffusion.schedule import Schedule
from fasttrain.diffusion.timestep_weights import range_edges
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

    The mean over the range's timesteps, each alike: how often a range is drawn is no part of it. Where a weighting varies much within a
    range (snr near t = 0), that is coarse: more ranges tell it finer.
    """
    pairs = itertools.pairwise(range_edges(schedule, ranges).tolist())
    mean = torch.stack([weighting(signal_to_noise(*schedule.alpha_sigma(_within(*pair, schedule)))).mean() for pair in pairs])
    return mean / mean.sum()


def _within(low: float, high: float, schedule: Schedule) -> Tensor:
    """All timesteps from `low` to below `high`; of a continuous path T of them, spread evenly."""
    if isinstance(low, int):
        return torch.arange(low, high)
    points = schedule.num_timesteps
    return low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points


def compare(gram: Tensor, noise: Tensor, shares: Mapping[str, Tensor], best: Tensor, regularisation: float) -> dict[str, dict[str, float]]:
    """Each weighting's objective, how many times the least one it is, the distance of its weights from the best ones; and the first anew
    without what noise adds to it, which few samples can even make negative.

    Args:
        gram: [K, K] float64.
        noise: [K], what of its diagonal is noise.
        shares: [K] by name.
        best: weights [K] at which the objective is least.
    """
    least = objective(gram, best, regularisation)
    return {
        name: {
            "objective": (value := objective(gram, share, regularisation)),
            "times_least": value / least if least > 0 else float("inf"),
            "distance": float((share / share.sum() - best).abs().sum()) / 2,
            "without_noise": objective(gram - noise.diag(), share, regularisation),
        }
        for name, share in shares.items()
    }
