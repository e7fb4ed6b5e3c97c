"""Weightings: limits, and the paper's numbers after conversion to each target."""

import pytest
import torch

from fasttrain.diffusion.objective import target_weight
from fasttrain.diffusion.prediction import PREDICTIONS
from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.weighting import WEIGHTINGS

INF = float("inf")


def weights(weighting: str, prediction: str) -> torch.Tensor:
    alpha, sigma = SCHEDULES.build("cosine").alpha_sigma(torch.arange(1000))
    return target_weight(WEIGHTINGS.build(weighting), PREDICTIONS.build(prediction), alpha, sigma)


@pytest.mark.parametrize(
    ("name", "at_zero", "at_two", "at_seven", "at_infinity"),
    [
        ("const", 1, 1, 1, 1),
        ("snr", 0, 2, 7, INF),
        ("max_snr", 1, 2, 7, INF),
        ("min_snr", 0, 2, 5, 5),
        ("soft_min_snr", 0, 10 / 7, 35 / 12, 5),
        ("flow", 1, (1 + 2**0.5) ** 2, (1 + 7**0.5) ** 2, INF),
    ],
)
def test_formula_and_limits(name: str, at_zero: float, at_two: float, at_seven: float, at_infinity: float) -> None:
    w = WEIGHTINGS.build(name)(torch.tensor([0.0, 2.0, 7.0, INF], dtype=torch.float64))
    torch.testing.assert_close(w, torch.tensor([at_zero, at_two, at_seven, at_infinity], dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize(("prediction", "mean"), [("x0", 2.0040), ("eps", 0.8240), ("v", 0.3261)])
def test_mean_of_min_snr_over_the_cosine_schedule(prediction: str, mean: float) -> None:
    assert weights("min_snr", prediction).mean().item() == pytest.approx(mean, abs=5e-5)


def test_golden_weights_of_min_snr() -> None:
    v, eps = weights("min_snr", "v"), weights("min_snr", "eps")
    assert v.max().item() == pytest.approx(0.8333, abs=5e-5)
    assert v[250].item() == pytest.approx(0.77056, abs=5e-6)
    assert eps[0].item() == pytest.approx(2.0643e-4, rel=2.5e-5)


def test_variance_preserving_conversions() -> None:
    """w_eps = w / SNR and w_v = w / (SNR + 1) [Hang et al. 2023, appendix B]."""
    alpha, sigma = SCHEDULES.build("cosine").alpha_sigma(torch.arange(1000))
    snr = alpha**2 / sigma**2
    for name in WEIGHTINGS.names():
        w = WEIGHTINGS.build(name)(snr)
        torch.testing.assert_close(weights(name, "eps"), w / snr, rtol=1e-12, atol=0)
        torch.testing.assert_close(weights(name, "v"), w / (snr + 1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["max_snr", "min_snr", "soft_min_snr"])
@pytest.mark.parametrize("gamma", [0, -1, float("nan")])
def test_gamma_must_be_positive(name: str, gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be positive"):
        WEIGHTINGS.build({"name": name, "gamma": gamma})
