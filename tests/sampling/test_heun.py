"""The Heun sampler on distributions whose denoiser is known in closed form."""

import pytest
import torch
from torch import Tensor

from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.errors import UserError
from fasttrain.sampling.heun import Heun, edm_grid
from fasttrain.sampling.sampler import SAMPLERS
from tests.diffusion.tables import TABLES
from tests.sampling.ideal import CENTRE, COND, SCHEDULE, SPREAD, TARGET, Ideal, deviation, no_more_noise, start


def exact(start: Tensor, sigma: Tensor) -> Tensor:
    """The denoised end of the flow of a normal distribution from sigma[0] to sigma[-1].

    The flow keeps each x at its number of standard deviations; the last step goes to sigma = 0 by the denoiser alone.
    """
    first, last = sigma[0].item(), sigma[-1].item()
    deviations = (first * start - CENTRE) / (SPREAD**2 + first**2) ** 0.5
    return CENTRE + deviations * SPREAD**2 / (SPREAD**2 + last**2) ** 0.5


@pytest.mark.parametrize("target", TARGET)
@pytest.mark.parametrize("name", SCHEDULE)
def test_reaches_the_exact_solution(name: str, target: str) -> None:
    schedule, prediction = SCHEDULE[name], TARGET[target]
    model = Ideal(schedule, prediction)
    _, sigma = edm_grid(schedule, 200)
    x0 = Heun(steps=200)(model, schedule, prediction, no_more_noise(), COND, torch.float64)
    assert x0.dtype == torch.float64
    torch.testing.assert_close(x0, exact(start(), sigma), rtol=0, atol=1e-3)


def test_is_of_second_order() -> None:
    """Twice the steps, a quarter of the error (continuous time, so that no sigma is rounded)."""
    schedule, prediction = SCHEDULE["flow"], TARGET["x0"]
    sigma = torch.tensor([80.0, 1e-3])
    errors = [
        (Heun(steps=n)(Ideal(schedule, prediction), schedule, prediction, no_more_noise(), COND, torch.float64) - exact(start(), sigma))
        .abs()
        .max()
        for n in (32, 64, 128)
    ]
    assert 3 < errors[0] / errors[1] < 6 and 3 < errors[1] / errors[2] < 6


def test_all_targets_walk_the_same_path() -> None:
    schedule = SCHEDULE["cosine"]
    ends = [Heun(steps=8)(Ideal(schedule, p), schedule, p, no_more_noise(), COND, torch.float64) for p in TARGET.values()]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 18, 30])
def test_evaluates_twice_a_step_but_once_in_the_last(steps: int) -> None:
    schedule, prediction = SCHEDULE["cosine"], TARGET["v"]
    model = Ideal(schedule, prediction)
    Heun(steps=steps)(model, schedule, prediction, no_more_noise(), COND, torch.float64)
    assert len(model.timesteps) == 2 * steps - 1
    assert all(t.dtype == torch.int64 and t.shape == (6,) for t in model.timesteps)


def test_model_runs_in_its_dtype() -> None:
    schedule, prediction = SCHEDULE["cosine"], TARGET["x0"]
    model = Ideal(schedule, prediction)
    assert Heun(steps=3)(model, schedule, prediction, no_more_noise(), COND, torch.bfloat16).dtype == torch.float64
    assert model.dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "first", "sigma_first", "sigma_last"), [("cosine", 991, 80.2037, 0.0064254), ("scaled_linear", 999, 14.61, 0.0292)]
)
def test_grid_runs_between_the_schedule_s_limits(name: str, first: int, sigma_first: float, sigma_last: float) -> None:
    t, sigma = edm_grid(SCHEDULE[name], 18)
    assert len(t) == 18 and t[0] == first and t[-1] == 0 and (t.diff() < 0).all()
    assert (sigma[0].item(), sigma[-1].item()) == pytest.approx((sigma_first, sigma_last), rel=2e-3)


@pytest.mark.parametrize("name", SCHEDULE)
def test_grid_follows_rho_7(name: str) -> None:
    """In sigma^(1/7) the ideal grid is even; rounding to a timestep moves a sigma by at most half the gap to its neighbour."""
    schedule = SCHEDULE[name]
    _, sigma = edm_grid(schedule, 10)
    ideal = torch.linspace(min(schedule.edm_limits[1], 80.0) ** (1 / 7), schedule.edm_limits[0] ** (1 / 7), 10, dtype=torch.float64) ** 7
    torch.testing.assert_close(sigma, ideal, rtol=0.13, atol=0)


def test_more_steps_than_timesteps_visits_none_twice() -> None:
    schedule = SCHEDULES.build({"name": "cosine", "num_timesteps": 10})
    t, _ = edm_grid(schedule, 500)
    assert t.tolist() == sorted(set(t.tolist()), reverse=True)


@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_schedules_are_sampled(name: str) -> None:
    schedule, prediction = SCHEDULES.build({"name": name, "zero_terminal": True}), TARGET["v"]
    x0 = Heun(steps=20)(Ideal(schedule, prediction), schedule, prediction, no_more_noise(), COND, torch.float64)
    assert x0.isfinite().all()


@pytest.mark.parametrize("key", ["sigma_max", "rho"])
def test_values_must_be_positive(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be positive"):
        SAMPLERS.build({"name": "heun", key: 0})


def test_a_start_below_the_schedule_is_refused() -> None:
    with pytest.raises(UserError, match=r"sigma_max 0\.001 lies below"):
        edm_grid(SCHEDULE["cosine"], 10, sigma_max=0.001)


@pytest.mark.parametrize(
    ("name", "too_much"),
    [("cosine", {6: 0.70, 10: 0.19, 18: 0.05, 30: 0.016}), ("scaled_linear", {6: 0.24, 10: 0.07, 18: 0.016, 30: 0.004})],
)
def test_few_steps_deviate_too_much_as_told(name: str, too_much: dict[int, float]) -> None:
    for steps, share in too_much.items():
        assert deviation(Heun(steps), SCHEDULE[name], 0.5) / 0.5 - 1 == pytest.approx(share, abs=0.006), steps


def test_few_steps_are_cautioned_of_and_no_others() -> None:
    others = [SAMPLERS.build({"name": name, "steps": 6}) for name in ("euler", "ddim", "dpm_solver")]
    assert "heun with 9 steps: its own error" in str(Heun(9).caution()) and not any(each.caution() for each in (Heun(10), *others))
