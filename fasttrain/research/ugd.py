"""Unconstrained gradient descent on Pareto weights: the paper's own solver, and how far its steps bring it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.research.frank_wolfe import Solution, check_matrix


@dataclass(frozen=True)
class Ugd:
    """w = softmax(beta), beta by gradient descent on w Q w from beta = 0                    [Hang et al. 2023, Eq. 12-13]

        d (w Q w) / d beta_k = 2 w_k ((Q w)_k - w Q w)

    The paper gives 250 steps (supplement, section 4.2) and no rate. None fits both two tasks and twenty, so the rate adapts: a step that
    would raise the objective is not taken and halves it, one that lowers it raises it by a tenth.

    Args:
        steps: of descent, those that are not taken included.
        rate: of the first, for a Q whose diagonal has mean 1; it is divided by that mean, so that the unit of gradients does not matter.

    Raises:
        ValueError: no steps, or a rate that is not positive.
    """

    steps: int = 250
    rate: float = 30.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < float("inf"):
            raise ValueError(f"steps and rate must be positive, got {self.steps} and {self.rate}")

    def solve(self, matrix: Tensor) -> Solution:
        """The weights after all steps; `gap` bounds how far they are from the least objective. Arguments as for `least_norm`."""
        check_matrix(matrix)
        scaled = matrix / matrix.diagonal().mean().clamp(min=1e-300)
        beta, rate = torch.zeros(len(matrix), dtype=matrix.dtype), self.rate
        weights = beta.softmax(0)
        value = weights @ scaled @ weights
        for _ in range(self.steps):
            tried = beta - rate * 2 * weights * (scaled @ weights - value)
            reached = (there := tried.softmax(0)) @ scaled @ there
            if reached <= value:
                beta, weights, value, rate = tried, there, reached, rate * 1.1
            else:
                rate /= 2
        gradient = 2 * matrix @ weights
        gap = float(weights @ gradient - gradient.min())
        return Solution(weights, float(weights @ matrix @ weights), max(gap, 0.0), self.steps)
