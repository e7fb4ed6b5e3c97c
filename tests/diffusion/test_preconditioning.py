"""EDM's preconditioning: its coefficients as published, and unit variance of what the network sees and predicts."""

import pytest
import torch
from torch import Tensor

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.objective import Objective
from fasttrain.diffusion.prediction import PREDICTIONS, given_scaled, to_x0
from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.timesteps import TIMESTEPS
from fasttrain.diffusion.weighting import WEIGHTINGS

PATHS = ("cosine", "linear", "flow", "edm")
PLACES = torch.tensor([3, 250, 500, 900])


def path(name: str) -> tuple[Tensor, Tensor]:
    return SCHEDULES.build(name).alpha_sigma(PLACES)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("d", [0.5, 1.0, 2.0])
def test_the_denoiser_is_edm_s(name: str, d: float) -> None:
    """D = c_skip x + c_out F for any F, with the coefficients of Karras et al. 2022, Table 1, at x = x_t / alpha."""
    alpha, sigma = path(name)
    prediction, f = PREDICTIONS.build({"name": "edm", "sigma_data": d}), torch.tensor([[0.3], [-2.0], [1.1], [0.7]]).double()
    x, s = torch.tensor([[1.5], [-0.4], [2.0], [-3.0]]).double(), (sigma / alpha)[:, None]
    c_skip, c_out, c_in = d**2 / (s**2 + d**2), s * d / (s**2 + d**2) ** 0.5, (s**2 + d**2) ** -0.5
    got = to_x0(prediction, f, alpha[:, None] * x, alpha, sigma)
    torch.testing.assert_close(got, c_skip * x + c_out * f, rtol=1e-9, atol=1e-12)
    scale = prediction.input_scale(alpha, sigma)
    assert scale is not None
    torch.testing.assert_close(scale * alpha, c_in[:, 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("d", [0.5, 1.7])
def test_input_and_target_have_unit_variance_on_data_of_that_deviation(name: str, d: float) -> None:
    n, generator = 200_000, torch.Generator().manual_seed(0)
    x0, eps = d * torch.randn(n, generator=generator).double(), torch.randn(n, generator=generator).double()
    prediction = PREDICTIONS.build({"name": "edm", "sigma_data": d})
    for alpha, sigma in zip(*path(name), strict=True):
        (a, b), scale = prediction.coefficients(alpha, sigma), prediction.input_scale(alpha, sigma)
        assert scale is not None
        for value in (a * x0 + b * eps, scale * (alpha * x0 + sigma * eps)):
            # The deviation of a variance of n normal numbers is sqrt(2 / n) = 0.0032.
            assert value.var().item() == pytest.approx(1, abs=4 * (2 / n) ** 0.5)


def test_on_unit_data_it_is_the_negative_of_v() -> None:
    alpha, sigma = path("cosine")
    for mine, of_v in zip(
        PREDICTIONS.build({"name": "edm", "sigma_data": 1}).coefficients(alpha, sigma),
        PREDICTIONS.build("v").coefficients(alpha, sigma),
        strict=True,
    ):
        torch.testing.assert_close(mine, -of_v, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", PATHS)
def test_the_network_is_given_the_same_in_training_and_in_sampling(name: str) -> None:
    schedule, prediction, seen = SCHEDULES.build(name), PREDICTIONS.build("edm"), []
    parts = (schedule, prediction, WEIGHTINGS.build("edm"), TIMESTEPS.build("stratified"))
    x0, cond, position = torch.randn(8, 1, 4, 4), Cond(torch.zeros(8).long()), torch.arange(8)

    def network(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append((x_t, t))
        return x_t

    Objective(*parts, nothing=Nothing(), seed=torch.tensor(1))(network, x0, cond, position)
    unscaled = Objective(schedule, PREDICTIONS.build("v"), *parts[2:], nothing=Nothing(), seed=torch.tensor(1))
    unscaled(given_scaled(network, schedule, prediction), x0, cond, position)
    (trained, t), (sampled, same) = seen
    assert torch.equal(t, same) and trained.dtype == sampled.dtype == torch.float32
    torch.testing.assert_close(sampled, trained, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(trained, unscaled._noised(x0, *(c.float() for c in schedule.alpha_sigma(t)), position, None)[0])


@pytest.mark.parametrize("d", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_deviations_are_refused(d: float) -> None:
    with pytest.raises(ValueError, match="sigma_data is the data's standard deviation"):
        PREDICTIONS.build({"name": "edm", "sigma_data": d})
