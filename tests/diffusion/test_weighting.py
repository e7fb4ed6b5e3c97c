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
        ("clamped_snr", 1, 2, 5, 5),
        ({"name": "clamped_snr", "floor": 3.0, "gamma": 6.0}, 3, 3, 6, 6),
        ("soft_min_snr", 0, 10 / 7, 35 / 12, 5),
        ("flow", 1, (1 + 2**0.5) ** 2, (1 + 7**0.5) ** 2, INF),
        ("p2", 0, 2 / 3, 7 / 8, 1),
        ({"name": "p2", "k": 2.0, "gamma": 0.5}, 0, 2 / 4**0.5, 7 / 9**0.5, INF),
        ({"name": "p2", "gamma": 2.0}, 0, 2 / 9, 7 / 64, 0),
        ({"name": "p2", "gamma": 0.0}, 0, 2, 7, INF),
        ("edm", 4, 6, 11, INF),
        ({"name": "edm", "sigma_data": 1.0, "gamma": 5.0}, 1, 3, 8 * 5 / 7, 5),
    ],
)
def test_formula_and_limits(name: str | dict, at_zero: float, at_two: float, at_seven: float, at_infinity: float) -> None:
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


def test_edm_weighs_every_error_of_its_preconditioned_target_alike() -> None:
    for d in (0.5, 1.0):
        weighting, target = WEIGHTINGS.build({"name": "edm", "sigma_data": d}), PREDICTIONS.build({"name": "edm", "sigma_data": d})
        for path in ("cosine", "flow", "edm"):
            at = SCHEDULES.build(path).alpha_sigma(torch.arange(1, 999))
            torch.testing.assert_close(target_weight(weighting, target, *at), torch.ones(998).double(), rtol=1e-12, atol=0)


def test_p2_is_its_papers_weight_on_the_error_of_the_noise() -> None:
    """1 / (k + SNR)^gamma times the plain loss of eps [Choi et al. 2022, Eq. 8]."""
    alpha, sigma = SCHEDULES.build("linear").alpha_sigma(torch.arange(1000))
    got = target_weight(WEIGHTINGS.build({"name": "p2", "k": 1.5, "gamma": 0.5}), PREDICTIONS.build("eps"), alpha, sigma)
    torch.testing.assert_close(got, (1.5 + (alpha / sigma) ** 2) ** -0.5, rtol=1e-12, atol=0)


def test_min_snr_on_edm_is_edm_s_loss_times_the_clipped_share() -> None:
    snr = torch.logspace(-6, 8, 50, dtype=torch.float64)
    plain, clipped = (WEIGHTINGS.build({"name": "edm", "gamma": gamma})(snr) for gamma in (None, 5.0))
    torch.testing.assert_close(clipped, plain * snr.clamp(max=5) / snr, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "p2", "k": 0}, "k must be positive"),
        ({"name": "p2", "gamma": -1}, "gamma must be 0 or more"),
        ({"name": "edm", "sigma_data": 0}, "sigma_data is the data's standard deviation"),
        ({"name": "edm", "gamma": 0}, "gamma must be positive"),
        ({"name": "clamped_snr", "floor": 0}, "floor must lie between 0 and gamma"),
        ({"name": "clamped_snr", "floor": 5}, "floor must lie between 0 and gamma"),
    ],
)
def test_impossible_parameters_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WEIGHTINGS.build(spec)


@pytest.mark.parametrize("name", ["max_snr", "min_snr", "clamped_snr", "soft_min_snr"])
@pytest.mark.parametrize("gamma", [0, -1, float("nan")])
def test_gamma_must_be_positive(name: str, gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be positive"):
        WEIGHTINGS.build({"name": name, "gamma": gamma})
