"""Euler's method on distributions whose denoiser is known in closed form."""

import pytest
import torch

from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.sampling import SAMPLERS
from fasttrain.sampling.euler import Euler
from tests.diffusion.tables import TABLES
from tests.sampling.ideal import CENTRE, COND, SCHEDULE, TARGET, Ideal, exact_end, no_more_noise, noise


def sampled(name: str, target: str, steps: int) -> torch.Tensor:
    schedule, prediction = SCHEDULE[name], TARGET[target]
    return Euler(steps)(Ideal(schedule, prediction), schedule, prediction, no_more_noise(), COND, torch.float64)


def error(name: str, target: str, steps: int) -> float:
    return (sampled(name, target, steps) - exact_end(SCHEDULE[name], SCHEDULE[name].spaced(steps))).abs().max().item()


@pytest.mark.parametrize("target", TARGET)
@pytest.mark.parametrize("name", SCHEDULE)
def test_is_of_first_order(name: str, target: str) -> None:
    """Twice the steps, half of the error. (These numbers of steps divide 1000 timesteps, so that none is rounded.)"""
    errors = [error(name, target, steps) for steps in (125, 250, 500)]
    assert errors[-1] < 0.01
    assert 1.6 < errors[0] / errors[1] < 2.2 and 1.6 < errors[1] / errors[2] < 2.2


def test_all_targets_walk_the_same_path() -> None:
    for name in SCHEDULE:
        ends = [sampled(name, target, 8) for target in TARGET]
        for end in ends[1:]:
            torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


def test_two_steps_of_rectified_flow_by_hand() -> None:
    """Each step adds (s - t) u: from the noise itself, stretched to t = 1000/1001, to 1/2, and from there to 0."""
    schedule, target = SCHEDULE["flow"], TARGET["flow"]
    first, half = 1000 / 1001, 0.5
    x = noise(0) * torch.hypot(torch.tensor(first), torch.tensor(1 - first)).item()
    u = Ideal(schedule, target)
    for here, there in ((first, half), (half, 0.0)):
        x = x + (there - here) * u(x, torch.full((6,), 1000 * here, dtype=torch.float64), COND)
    torch.testing.assert_close(sampled("flow", "flow", 2), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_evaluates_once_a_step_from_noise_to_data(steps: int) -> None:
    schedule, prediction = SCHEDULE["cosine"], TARGET["v"]
    model = Ideal(schedule, prediction)
    Euler(steps)(model, schedule, prediction, noise, COND, torch.bfloat16)
    assert [t[0].item() for t in model.timesteps] == schedule.spaced(steps).tolist() and model.timesteps[0][0] == 999
    assert model.dtypes == {torch.bfloat16}


@pytest.mark.parametrize("target", ["x0", "v", "flow"])
@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_schedules_begin_at_their_last_timestep(name: str, target: str) -> None:
    """Where no data is left, the best network can only say its mean."""
    schedule, prediction = SCHEDULES.build({"name": name, "zero_terminal": True}), TARGET[target]
    x0 = Euler(1)(Ideal(schedule, prediction), schedule, prediction, noise, COND, torch.float64)
    torch.testing.assert_close(x0, torch.full_like(x0, CENTRE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS.names())
@pytest.mark.parametrize("steps", [0, -1, 10_001])
def test_numbers_of_steps_that_cannot_be(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1 and at most 10000"):
        SAMPLERS.build({"name": name, "steps": steps})
