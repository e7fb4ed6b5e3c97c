"""Equation 11 and the weights that fixed weightings put into it."""

import pytest
import torch

from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.timestep_weights import Table, placed
from fasttrain.diffusion.weighting import WEIGHTINGS, signal_to_noise
from fasttrain.research.frank_wolfe import least_norm
from fasttrain.research.pareto import compare, normalised, objective, range_weights, regularised

GRAM = torch.tensor([[2.0, -1.0], [-1.0, 4.0]], dtype=torch.float64)


def test_equation_11_by_hand() -> None:
    """w = (3/4, 1/4): 9/16 2 - 2 3/16 + 1/16 4 = 1; and lambda (9/16 + 1/16)."""
    weights = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert objective(GRAM, weights, 0.0) == pytest.approx(1.0)
    assert objective(GRAM, weights, 0.8) == pytest.approx(1.5)
    assert objective(GRAM, 7 * weights, 0.8) == pytest.approx(1.5), "only how weights compare may count"


def test_normalised_has_a_mean_squared_length_of_1() -> None:
    assert normalised(GRAM).diagonal().mean() == 1 and normalised(1e-9 * GRAM).diagonal().mean() == pytest.approx(1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("weighting", ["const", "snr", "min_snr", "max_snr"])
def test_range_weights_are_means_over_each_timestep(schedule: str, weighting: str) -> None:
    made, w = SCHEDULES.build(schedule), WEIGHTINGS.build(weighting)
    each = w(signal_to_noise(*made.alpha_sigma(torch.arange(1000)))).view(10, 100).mean(1)
    torch.testing.assert_close(range_weights(w, made, 10), each / each.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("spec", [*SCHEDULES.names(), {"name": "flow", "shift": 3}], ids=str)
def test_a_table_gives_its_own_weights_back(spec: str) -> None:
    weights, schedule = (1.0, 5.0, 0.0, 2.0), SCHEDULES.build(spec)
    assert range_weights(placed(Table(weights), schedule), schedule, 4).tolist() == pytest.approx([w / 8 for w in weights])


def test_comparison_against_the_optimum() -> None:
    best = least_norm(regularised(GRAM, 0.1)).weights
    noise = torch.tensor([0.4, 0.0], dtype=torch.float64)
    found = compare(GRAM, noise, {"best": best, "equal": torch.ones(2, dtype=torch.float64)}, best, 0.1)
    assert found["best"]["times_least"] == pytest.approx(1) and found["best"]["distance"] == pytest.approx(0)
    assert found["equal"]["times_least"] > 1 and found["equal"]["distance"] == pytest.approx(float((best - 0.5).abs().max()))
    assert found["equal"]["without_noise"] == pytest.approx(found["equal"]["objective"] - 0.4 / 4)


@pytest.mark.parametrize("given", [-0.1, float("nan"), float("inf")])
def test_an_impossible_lambda_is_refused(given: float) -> None:
    with pytest.raises(ValueError, match="lambda"):
        regularised(GRAM, given)
