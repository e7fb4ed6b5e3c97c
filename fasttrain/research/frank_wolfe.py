"""The point of least norm in a convex hull, by Frank and Wolfe's method with pairwise steps."""

from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Weights on the simplex, and how far from the best they can be.

    Attributes:
        weights: [K] float64, not negative, of sum 1.
        objective: w Q w.
        gap: the objective lies at most this much above the least one.
        iterations: that were taken.
    """

    weights: Tensor
    objective: float
    gap: float
    iterations: int


def least_norm(matrix: Tensor, iterations: int = 10_000, tolerance: float = 1e-10) -> Solution:
    """min over the simplex of w Q w [Frank and Wolfe 1956; pairwise steps: Lacoste-Julien and Jaggi 2015, algorithm 2].

    Each step moves weight from the worst corner that has some to the best one, by an exact line search; the error falls geometrically.
    The gap w . grad - min grad bounds it, by convexity.

    Args:
        matrix: Q [K, K] float64, symmetric, positive semi-definite: the Gram matrix of K vectors, plus lambda on its diagonal.
        iterations: at most.
        tolerance: the gap at which to end, as a share of the largest entry on the diagonal.

    Raises:
        ValueError: Q is not square, or not finite.
    """
    check_matrix(matrix)
    weights = matrix.new_full((len(matrix),), 1 / len(matrix))
    enough = tolerance * float(matrix.diagonal().max())
    for iteration in range(iterations + 1):
        gradient = 2 * matrix @ weights
        best = int(gradient.argmin())
        gap = float(weights @ gradient - gradient[best])
        if gap <= enough or iteration == iterations:
            break
        worst = int(torch.where(weights > 0, gradient, -torch.inf).argmax())
        moved = _step(matrix, gradient, best, worst, float(weights[worst]))
        weights[best] += moved
        weights[worst] -= moved
    return Solution(weights, float(weights @ matrix @ weights), max(gap, 0.0), iteration)


def check_matrix(matrix: Tensor) -> None:
    """Raises ValueError for what is no finite square matrix."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"the matrix must be [K, K], got {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("the matrix is not finite")


def _step(matrix: Tensor, gradient: Tensor, best: int, worst: int, most: float) -> float:
    """The best amount to move from `worst` to `best`: along d = e_best - e_worst the objective is a parabola; at most all there is."""
    slope = float(gradient[worst] - gradient[best])
    curvature = 2 * float(matrix[best, best] + matrix[worst, worst] - 2 * matrix[best, worst])
    return min(most, slope / curvature) if curvature > 0 else most
