"""Frank-Wolfe and UGD on problems with a known answer."""

import itertools

import pytest
import torch
from torch import Tensor

from fasttrain.research.frank_wolfe import least_norm
from fasttrain.research.ugd import Ugd


def gram(*vectors: list[float]) -> Tensor:
    rows = torch.tensor(vectors, dtype=torch.float64)
    return rows @ rows.T


def random_gram(k: int, dimension: int, seed: int) -> Tensor:
    rows = torch.randn(k, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows @ rows.T


def exact(matrix: Tensor) -> tuple[Tensor, float]:
    """The best weights by trying each set of corners that may have weight: on it Q w = c 1, and outside it (Q w)_k >= c."""
    k, best, least = len(matrix), torch.zeros(0), float("inf")
    for size in range(1, k + 1):
        for chosen in itertools.combinations(range(k), size):
            index = torch.tensor(chosen)
            part = torch.linalg.lstsq(matrix[index][:, index], torch.ones(size, dtype=torch.float64)).solution
            weights = torch.zeros(k, dtype=torch.float64)
            weights[index] = part / part.sum()
            value = float(weights @ matrix @ weights)
            if (weights >= -1e-12).all() and value < least:
                best, least = weights, value
    return best, least


SOLVERS = {"frank_wolfe": (least_norm, 1e-8), "ugd": (Ugd(steps=1000).solve, 2e-3)}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("vectors", [([1.0, 0.0], [1.0, 2.0]), ([3.0, 1.0], [-1.0, 2.0]), ([1.0, 0.0], [3.0, 0.5])])
def test_two_vectors_in_closed_form(solver: str, vectors: tuple[list[float], list[float]]) -> None:
    """w_1 = clip((g_2 - g_1) . g_2 / |g_1 - g_2|^2, 0, 1) [Sener and Koltun 2018, algorithm 1]."""
    solve, tolerance = SOLVERS[solver]
    first, second = (torch.tensor(v, dtype=torch.float64) for v in vectors)
    share = float(((second - first) @ second / (first - second).square().sum()).clamp(0, 1))
    assert solve(gram(*vectors)).weights.tolist() == pytest.approx([share, 1 - share], abs=tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_orthogonal_vectors_weigh_as_one_over_their_squares(solver: str) -> None:
    solve, tolerance = SOLVERS[solver]
    squares = torch.tensor([1.0, 2.0, 4.0, 0.5], dtype=torch.float64)
    expected = (1 / squares) / (1 / squares).sum()
    found = solve(torch.diag(squares))
    assert found.weights.tolist() == pytest.approx(expected.tolist(), abs=tolerance)
    assert found.objective == pytest.approx(1 / float((1 / squares).sum()), rel=tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_opposite_vectors_cancel(solver: str) -> None:
    """g and -2 g leave nothing: there is no direction that is good for both."""
    solve, tolerance = SOLVERS[solver]
    found = solve(gram([1.0, 1.0], [-2.0, -2.0]))
    assert found.weights.tolist() == pytest.approx([2 / 3, 1 / 3], abs=tolerance)
    assert found.objective < 1e-4 if solver == "ugd" else found.objective < 1e-9


@pytest.mark.parametrize(("k", "dimension"), [(6, 3), (6, 20), (7, 7)])
def test_random_vectors_against_every_set_of_corners(k: int, dimension: int) -> None:
    """More vectors than dimensions leave next to nothing: there the objective is met to a share of the vectors' own squares."""
    for seed in range(2):
        matrix = random_gram(k, dimension, seed) + 1e-3 * torch.eye(k, dtype=torch.float64)
        best, least = exact(matrix)
        scale, found = float(matrix.diagonal().max()), least_norm(matrix)
        assert -1e-12 <= found.objective - least <= found.gap + 1e-12, "the gap is no bound"
        assert found.objective == pytest.approx(least, rel=1e-7, abs=1e-6 * scale)
        assert Ugd(steps=1000).solve(matrix).objective == pytest.approx(least, rel=0.02, abs=1e-3 * scale)
        if dimension >= k:
            assert found.weights.tolist() == pytest.approx(best.tolist(), abs=1e-3)


def test_the_direction_improves_every_task() -> None:
    """Where no point of the hull is 0, <g_k, u> >= |u|^2 for all k: no loss rises to first order [Hang et al. 2023, appendix A]."""
    matrix = random_gram(5, 40, seed=3)
    found = least_norm(matrix)
    assert float((matrix @ found.weights).min()) == pytest.approx(found.objective, rel=1e-6) and found.objective > 1


def test_ugd_descends_towards_the_least_and_its_gap_bounds_the_rest() -> None:
    matrix = random_gram(10, 30, seed=5)
    least = least_norm(matrix).objective
    values = [Ugd(steps=steps).solve(matrix) for steps in (1, 10, 250)]
    assert values[0].objective > values[1].objective > values[2].objective >= least - 1e-9
    assert all(found.objective - least <= found.gap for found in values)
    assert float(values[2].weights.sum()) == pytest.approx(1)


def test_ugd_does_not_see_the_unit_of_gradients() -> None:
    matrix = random_gram(6, 9, seed=1)
    torch.testing.assert_close(Ugd().solve(matrix).weights, Ugd().solve(matrix * 1e-9).weights)


@pytest.mark.parametrize("solve", [least_norm, Ugd().solve])
@pytest.mark.parametrize("matrix", [torch.zeros(2, 3), torch.zeros(0, 0), torch.full((2, 2), float("nan"))])
def test_what_is_no_gram_matrix_is_refused(solve, matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="matrix"):
        solve(matrix)


def test_a_matrix_of_zeros_has_every_answer() -> None:
    for found in (least_norm(torch.zeros(3, 3, dtype=torch.float64)), Ugd().solve(torch.zeros(3, 3, dtype=torch.float64))):
        assert found.objective == 0 and float(found.weights.sum()) == pytest.approx(1)
