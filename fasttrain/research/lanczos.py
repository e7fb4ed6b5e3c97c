"""Spectra of symmetric matrices that are known only by their products with vectors: Lanczos' method and its quadrature.

    H Q_m = Q_m T_m + beta_m q_(m+1) e_m^T,  T_m tridiagonal                                   [Golub and Van Loan 2013, section 10.1]
    v^T f(H) v = |v|^2 sum_i tau_i f(theta_i),  (theta_i, s_i) of T_m, tau_i = s_1i^2           [Golub and Meurant 2010, chapter 6]

Means of the latter over random v are traces: of H, of H^2 and of the spectral density (stochastic Lanczos quadrature).
Without reorthogonalisation rounding gives copies of the outermost eigenvalues: here each new vector is made orthogonal to all, twice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""v [P] -> H v [P], H symmetric."""

INVARIANT = 1e-6  # of the largest |T|: a vector shorter than this is rounding, and the space is invariant; 1e-12 in float64


class Ritz(NamedTuple):
    """An approximate eigenvalue. An eigenvalue of H lies within `bound` of it, as exactly as products are."""

    value: float
    bound: float


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What m steps from one unit vector q_1 tell.

    Attributes:
        nodes: theta [m] float64, increasing.
        weights: tau [m] float64, of sum 1.
        bounds: [m] float64, |H x - theta x| of the Ritz vectors x: |beta_m s_mi|.
        vectors: the Ritz vectors of the lowest and the highest node, [2, P].
        first_moment, second_moment: q_1^T H q_1 and |H q_1|^2.
    """

    nodes: Tensor
    weights: Tensor
    bounds: Tensor
    vectors: Tensor
    first_moment: float
    second_moment: float

    def lowest(self, count: int) -> list[Ritz]:
        """The lowest eigenvalues found, the lowest first."""
        return [Ritz(*pair) for pair in zip(self.nodes[:count].tolist(), self.bounds[:count].tolist(), strict=True)]

    def highest(self, count: int) -> list[Ritz]:
        """The highest eigenvalues found, the highest first."""
        ends = [values.flip(0)[:count].tolist() for values in (self.nodes, self.bounds)]
        return [Ritz(*pair) for pair in zip(*ends, strict=True)]


def lanczos(product: Product, start: Tensor, steps: int) -> Spectrum:
    """The spectrum of H as seen from `start` [P], with full reorthogonalisation.

    Ends early where the vectors span an invariant space: the nodes are then eigenvalues of H. Keeps `steps` vectors in start's dtype.

    Raises:
        ValueError: no steps, no start, or a product that is not finite.
    """
    length = float(start.norm())
    if steps < 1 or not 0 < length < math.inf:
        raise ValueError(f"give at least one step and a start that is not 0, got {steps} and length {length}")
    basis = torch.empty(min(steps, len(start)), len(start), dtype=start.dtype, device=start.device)
    basis[0] = start / length
    alphas: list[float] = []
    betas: list[float] = []
    second_moment = 0.0
    for step in range(len(basis)):
        image = product(basis[step])
        if step == 0:
            second_moment = float(image.double().square().sum())
        if not image.isfinite().all():
            raise ValueError("a product is not finite")
        alphas.append(float(image.double() @ basis[step].double()))
        rest = _orthogonal(image, basis[: step + 1])
        betas.append(float(rest.norm()))
        if betas[-1] <= _smallest(start.dtype) * max(map(abs, [*alphas, *betas])):
            break
        if step + 1 < len(basis):
            basis[step + 1] = rest / betas[-1]
    return _spectrum(alphas, betas, basis[: len(alphas)], second_moment)


def checked(product: Product, vector: Tensor) -> Ritz:
    """The Rayleigh quotient of a unit vector and its residual |H x - theta x|, by one more product: no trust in the recurrence."""
    image, vector = product(vector).double(), vector.double()
    vector = vector / vector.norm()
    value = float(image @ vector)
    return Ritz(value, float((image - value * vector).norm()))


def asymmetry(product: Product, first: Tensor, second: Tensor) -> float:
    """|<u, H v> - <v, H u>|, as a share of the larger of the two: what rounding leaves of the symmetry of H."""
    there, back = (float(one.double() @ product(other).double()) for one, other in ((first, second), (second, first)))
    return abs(there - back) / max(abs(there), abs(back)) if there or back else 0.0


class Estimate(NamedTuple):
    """A mean over random vectors and its standard error (NaN for one vector)."""

    value: float
    error: float


def trace(spectra: Sequence[Spectrum], size: int) -> Estimate:
    """tr H = P E[q^T H q] over random signs q of length 1                                                        [Hutchinson 1990]."""
    return _estimate([size * spectrum.first_moment for spectrum in spectra])


def squared_trace(spectra: Sequence[Spectrum], size: int) -> Estimate:
    """tr H^2 = P E[|H q|^2], the sum of the squared eigenvalues."""
    return _estimate([size * spectrum.second_moment for spectrum in spectra])


def density(spectra: Sequence[Spectrum], at: Tensor, width: float) -> Tensor:
    """Share of all eigenvalues per unit, at places [n] float64: normal curves of this width around the nodes, by their weights."""
    found = torch.zeros_like(at)
    for spectrum in spectra:
        away = (at[:, None] - spectrum.nodes[None, :]) / width
        found += (torch.exp(-0.5 * away.square()) * spectrum.weights).sum(dim=1) / (width * math.sqrt(2 * math.pi))
    return found / len(spectra)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """`vector` without its parts along the rows of `basis`; twice, as once leaves the rounding of large parts [Parlett 1998, 6.9]."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def _smallest(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else INVARIANT


def _spectrum(alphas: list[float], betas: list[float], basis: Tensor, second_moment: float) -> Spectrum:
    between = torch.tensor(betas[:-1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(between, 1) + torch.diag(between, -1)
    nodes, turns = torch.linalg.eigh(tridiagonal)
    ends = turns[:, [0, -1]].T.to(basis)  # [2, m]
    return Spectrum(nodes, turns[0].square(), betas[-1] * turns[-1].abs(), ends @ basis, alphas[0], second_moment)


def _estimate(values: list[float]) -> Estimate:
    many = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(many.mean()), float(many.std()) / math.sqrt(len(many)) if len(many) > 1 else math.nan)
