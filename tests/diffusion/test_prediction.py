"""Targets: round trips, factors, and the matrix of weightings, targets and paths."""

import pytest
import torch
from torch import Tensor

from fasttrain.diffusion.objective import target_weight
from fasttrain.diffusion.prediction import PREDICTIONS, to_eps, to_x0, weight_factor
from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.weighting import WEIGHTINGS, signal_to_noise

PATHS = [*SCHEDULES.names(), "off"]
TARGETS = {name: PREDICTIONS.build(name) for name in PREDICTIONS.names()}


def path(name: str) -> tuple[Tensor, Tensor]:
    """alpha and sigma: of a schedule, or of a pair that no schedule has."""
    if name == "off":
        return torch.tensor([0.7, 0.8], dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)
    timesteps = torch.linspace(50, 950, 19, dtype=torch.float64) if name == "flow" else torch.tensor([0, 1, 130, 261, 500, 900, 990])
    return SCHEDULES.build(name).alpha_sigma(timesteps)


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(count, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PATHS)
def test_round_trip(target: str, name: str) -> None:
    alpha, sigma = path(name)
    x0, eps = images(len(alpha))
    prediction = TARGETS[target]
    a, b = prediction.coefficients(alpha, sigma)
    x_t, exact = column(alpha) * x0 + column(sigma) * eps, column(a) * x0 + column(b) * eps
    # Rounding in x_t or the target comes back multiplied by 1 / sigma or 1 / alpha: at most 157 and 90 here.
    torch.testing.assert_close(to_x0(prediction, exact, x_t, alpha, sigma), x0, rtol=0, atol=1e-13)
    torch.testing.assert_close(to_eps(prediction, exact, x_t, alpha, sigma), eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS.names())
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PATHS)
def test_gradient_of_the_implied_x0_is_that_of_the_x0_formulation(weighting: str, target: str, name: str) -> None:
    alpha, sigma = path(name)
    x0, eps = images(len(alpha))
    prediction, w = TARGETS[target], WEIGHTINGS.build(weighting)
    x_t = column(alpha) * x0 + column(sigma) * eps
    implied = (x0 + 0.1 * eps.flip(0)).requires_grad_()

    in_x0 = (column(w(signal_to_noise(alpha, sigma))) * (implied - x0) ** 2).sum()
    a, b = prediction.coefficients(alpha, sigma)
    # The network's output for which the implied data is `implied`, from the definition of x_t alone.
    output = column(a) * implied + column(b) * (x_t - column(alpha) * implied) / column(sigma)
    exact = column(a) * x0 + column(b) * eps
    in_target = (column(target_weight(w, prediction, alpha, sigma)) * (output - exact) ** 2).sum()

    (expected,) = torch.autograd.grad(in_x0, implied)
    (actual,) = torch.autograd.grad(in_target, implied)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("target", "alpha", "sigma", "factor"),
    [("v", 0.7, 0.3, 0.268), ("flow", 0.7, 0.3, 0.09), ("flow", 0.8, 0.6, 0.184), ("x0", 0.7, 0.3, 1)],
)
def test_factors(target: str, alpha: float, sigma: float, factor: float) -> None:
    at = (torch.tensor([value], dtype=torch.float64) for value in (alpha, sigma))
    assert weight_factor(TARGETS[target], *at).item() == pytest.approx(factor, abs=5e-4)


@pytest.mark.parametrize(
    ("target", "at_data", "at_noise"),
    [("x0", 1, 1), ("eps", 0, float("inf")), ("v", 0, 1), ("flow", 0, 1), ("edm", 0, 0.25)],
)
def test_factor_at_the_ends(target: str, at_data: float, at_noise: float) -> None:
    alpha, sigma = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    assert weight_factor(TARGETS[target], alpha, sigma).tolist() == [at_data, at_noise]


def test_pure_targets_need_no_division_at_the_ends() -> None:
    alpha, sigma = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    x0, eps = images(2)
    x_t = column(alpha) * x0 + column(sigma) * eps
    assert torch.equal(to_x0(PREDICTIONS.build("x0"), x0, x_t, alpha, sigma), x0)
    assert torch.equal(to_eps(PREDICTIONS.build("eps"), eps, x_t, alpha, sigma), eps)


def test_the_flow_target_is_stable_diffusion_3_s_and_the_negative_of_lightning_dit_s() -> None:
    """At our t = 0.7 T, by hand: z = 0.3 x0 + 0.7 eps, eps - x0 [SD3]; LightningDiT's time runs from noise, 0.3, and its v is x0 - eps."""
    alpha, sigma = SCHEDULES.build("flow").alpha_sigma(torch.tensor([700.0]))
    assert (alpha.item(), sigma.item()) == pytest.approx((0.3, 0.7), rel=1e-15)
    x0, eps = torch.tensor([[2.0]]).double(), torch.tensor([[-1.0]]).double()
    x_t = alpha * x0 + sigma * eps
    assert x_t.item() == pytest.approx(-0.1)
    a, b = TARGETS["flow"].coefficients(alpha, sigma)
    assert (a * x0 + b * eps).item() == -3.0
    u = torch.tensor([[-3.0]])
    assert to_x0(TARGETS["flow"], u, x_t, alpha, sigma).item() == pytest.approx(2.0)  # x_t - sigma u
    assert to_eps(TARGETS["flow"], u, x_t, alpha, sigma).item() == pytest.approx(-1.0)  # x_t + alpha u
