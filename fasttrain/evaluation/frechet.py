"""The Frechet distance between two sets of feature vectors, each seen as a Gaussian, in float64."""

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """Mean and covariance of a set of vectors."""

    mean: Tensor  # [D] float64
    cov: Tensor  # [D, D] float64, divisor n - 1
    vectors: int | None  # how many there were; None where nobody says


class Moments:
    """Mean and covariance in one pass over batches, merged so that no digits cancel.

    mean' = mean + delta m / (n + m),   M' = M + M_batch + delta delta^T n m / (n + m)       [Chan, Golub and LeVeque 1983, Eq. 2.1]

    with m rows in the batch, delta the difference of the means and M the sum of squared deviations.
    """

    def __init__(self, dim: int):
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Takes in features [m, D] of any float dtype."""
        rows = features.double()
        if len(rows) == 0:
            return
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._take(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Takes in the rows behind other moments, as another process counted them."""
        if other._count:
            self._take(other._count, other._mean, other._scatter)

    def _take(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        delta, total = mean - self._mean, self._count + count
        self._scatter += scatter
        self._scatter.addr_(delta, delta, alpha=self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total

    def gaussian(self) -> Gaussian:
        """The moments so far.

        Raises:
            ValueError: fewer than two vectors have no covariance.
        """
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self._count}")
        return Gaussian(self._mean.clone(), self._scatter / (self._count - 1), self._count)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|mu_1 - mu_2|^2 + Tr S_1 + Tr S_2 - 2 Tr sqrt(S_1^(1/2) S_2 S_1^(1/2))       [Dowson and Landau 1982, Eq. 4]

    The roots S = A A^T come from symmetric eigen-decompositions, and the last trace is the sum of the singular values of A_1^T A_2,
    which is the same number without the loss of half the digits that squaring and rooting costs. Covariances of any rank.

    Raises:
        ValueError: vectors of different lengths.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features have different lengths: {len(one.mean)} and {len(other.mean)}")
    shared = torch.linalg.svdvals(_root(one.cov).T @ _root(other.cov)).sum()
    distance = (one.mean - other.mean).square().sum() + one.cov.trace() + other.cov.trace() - 2 * shared
    return max(distance.item(), 0.0)


def _root(cov: Tensor) -> Tensor:
    """A [D, r] with A A^T = cov of rank r; what rounding leaves of the zero eigenvalues, of either sign, is left out."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1] * len(cov) * torch.finfo(cov.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
