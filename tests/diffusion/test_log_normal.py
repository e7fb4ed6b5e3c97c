"""EDM's noise levels: their distribution, the time that a model is told, and the path's ends."""

import math

import pytest
import torch

from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.timesteps import TIMESTEPS

EDM = SCHEDULES.build("edm")


def log_sigma(t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = EDM.alpha_sigma(t)
    return (sigma / alpha).log()


def test_log_sigma_is_normal() -> None:
    """EDM's P_mean = -1.2 and P_std = 1.2; Kolmogorov-Smirnov over 40,000 draws, within what one sample in a hundred exceeds."""
    n = 40_000
    t = EDM.timestep(TIMESTEPS.build("uniform").draw(torch.tensor(5), torch.arange(n)))
    cumulative = torch.special.ndtr((log_sigma(t) + 1.2) / 1.2).sort().values
    assert (cumulative - (torch.arange(n) + 0.5) / n).abs().max() < 1.63 / n**0.5
    assert log_sigma(t).mean().item() == pytest.approx(-1.2, abs=4 * 1.2 / n**0.5)


def test_the_path_is_variance_preserving_and_ends_where_edm_samples() -> None:
    t = torch.linspace(0, 1000, 101, dtype=torch.float64)
    alpha, sigma = EDM.alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    assert (sigma / alpha)[[0, -1]].tolist() == pytest.approx([0.002, 80], rel=1e-12)
    assert (alpha.diff() < 0).all()


def test_the_model_is_told_edm_s_noise_on_another_scale() -> None:
    """c_noise = ln(s) / 4 [Karras et al. 2022, Table 1]: t is linear in it."""
    t = torch.linspace(10, 990, 50, dtype=torch.float64)
    c_noise = log_sigma(t) / 4
    slopes = t.diff() / c_noise.diff()
    assert slopes.tolist() == pytest.approx([1000 * 4 / math.log(80 / 0.002)] * 49, rel=1e-9)


def test_a_draw_never_reaches_the_ends_and_nearest_finds_it() -> None:
    t = EDM.timestep(torch.tensor([0.0, 1e-7, 0.5, 1 - 2.0**-53], dtype=torch.float64))
    assert (t > 0).all() and (t < 1000).all() and t.diff()[1:].min() > 0
    torch.testing.assert_close(EDM.nearest(log_sigma(t).exp()), t, rtol=1e-9, atol=1e-9)
    assert torch.div(t[[0, -1]] * 10, 1000, rounding_mode="floor").tolist() == [0, 9]


@pytest.mark.parametrize("params", [{"std": 0}, {"std": math.nan}, {"mean": 30}, {"num_timesteps": 1}])
def test_impossible_parameters_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        SCHEDULES.build({"name": "edm", **params})
