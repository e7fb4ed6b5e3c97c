"""DDIM, DPM-Solver++ and DDPM, through diffusers, on distributions whose denoiser is known in closed form."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttrain.cond import Cond
from fasttrain.diffusion.schedule import SCHEDULES, Schedule
from fasttrain.errors import UserError
from fasttrain.sampling import SAMPLERS, Sampler
from fasttrain.sampling.diffusers import Ddim, Ddpm, DpmSolver
from fasttrain.sampling.euler import Euler
from fasttrain.sampling.spacing import Spaced
from tests.diffusion.tables import TABLES
from tests.sampling.ideal import CENTRE, COND, SCHEDULE, SPREAD, TARGET, Ideal, exact_end, no_more_noise, noise

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'fasttrain[latents]'")

ZERO_TERMINAL = {f"{name}, zero terminal": SCHEDULES.build({"name": name, "zero_terminal": True}) for name in TABLES}


def sampled(sampler: Sampler, schedule: Schedule, target: str) -> Tensor:
    return sampler(Ideal(schedule, TARGET[target]), schedule, TARGET[target], no_more_noise(), COND, torch.float64)


def error(sampler: Spaced, schedule: Schedule, target: str) -> float:
    return (sampled(sampler, schedule, target) - exact_end(schedule, sampler.timesteps(schedule))).abs().max().item()


@pytest.mark.parametrize("target", TARGET)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("name", SCHEDULE)
def test_ddim_without_noise_is_euler(name: str, steps: int, target: str) -> None:
    ours, theirs = (sampled(sampler, SCHEDULE[name], target) for sampler in (Euler(steps), Ddim(steps)))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-8)


@pytest.mark.parametrize("target", TARGET)
def test_dpm_solver_is_of_second_order(target: str) -> None:
    """Twice the steps, a quarter of the error, in continuous time: a table rounds even steps in log SNR to its timesteps."""
    errors = [error(DpmSolver(steps), SCHEDULE["flow"], target) for steps in (30, 60, 120)]
    assert errors[-1] < 1e-3
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5


@pytest.mark.parametrize("target", TARGET)
@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_dpm_solver_is_of_second_order_on_trailing_timesteps(name: str, target: str) -> None:
    """But for a logarithm: timesteps that are even in time are not even in log SNR."""
    errors = [error(DpmSolver(steps, spacing="trailing"), SCHEDULE[name], target) for steps in (125, 250, 500)]
    assert errors[-1] < 2e-4
    assert 3 < errors[0] / errors[1] < 4.5 and 3 < errors[1] / errors[2] < 4.5


@pytest.mark.parametrize("target", TARGET)
@pytest.mark.parametrize("name", SCHEDULE)
def test_dpm_solver_is_nearer_than_ddim_and_its_third_order_than_its_second(name: str, target: str) -> None:
    """On all schedules, also on those whose sigma begins as the root of t, where the last steps in log SNR never grow short.

    EDM's begins at sigma 80, where the first steps, of lower order for want of history, still count: a third of the error at any N.
    """
    samplers = (DpmSolver(100, order=3, spacing="trailing"), DpmSolver(100, spacing="trailing"), Ddim(100))
    third, second, first = (error(sampler, SCHEDULE[name], target) for sampler in samplers)
    assert (2 if name == "edm" else 4) * third < second and 4 * second < first


def noting(taken: list[int], number: int, update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same update, which puts its number down."""

    def noted(*given: object, **options: object) -> Tensor:
        taken.append(number)
        return update(*given, **options)

    return noted


@pytest.mark.parametrize("steps", [14, 15])
@pytest.mark.parametrize("order", [2, 3])
def test_the_orders_of_dpm_solver_s_first_and_last_steps(order: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its docstring tells them: of what history there is, the last always of first order, the one before it of second below 15."""
    taken: list[int] = []
    kind = diffusers.DPMSolverMultistepScheduler
    updates = ("dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update", "multistep_dpm_solver_third_order_update")
    for number, name in enumerate(updates, start=1):
        monkeypatch.setattr(kind, name, noting(taken, number, getattr(kind, name)))
    sampled(DpmSolver(steps, order=order), SCHEDULE["flow"], "v")
    before_last = 2 if steps < 15 else order
    assert taken == [1, 2, *[order] * (steps - 4), before_last, 1]


def test_dpm_solver_of_first_order_is_ddim() -> None:
    made = [sampled(sampler, SCHEDULE["flow"], "v") for sampler in (DpmSolver(40, order=1), Ddim(40, spacing="log_snr"))]
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-5)  # diffusers' float32


@pytest.mark.parametrize("sampler", [Ddim(40), Ddim(40, eta=0.5), Ddpm(40), DpmSolver(40), DpmSolver(40, order=3)], ids=str)
@pytest.mark.parametrize("target", ["x0", "v", "flow"])
@pytest.mark.parametrize("name", ZERO_TERMINAL)
def test_zero_terminal_schedules_begin_at_their_last_timestep(name: str, target: str, sampler: Spaced) -> None:
    schedule = ZERO_TERMINAL[name]
    model = Ideal(schedule, TARGET[target])
    x0 = sampler(model, schedule, TARGET[target], noise, COND, torch.float64)
    assert [t[0].item() for t in model.timesteps] == sampler.timesteps(schedule).tolist()
    assert model.timesteps[0][0] == 999 and 38 <= len(model.timesteps) <= 40 and x0.isfinite().all()
    assert abs(x0.mean().item() - CENTRE) < 0.3 and 0.3 < x0.std().item() < 0.7


def posterior_chain(schedule: Schedule, t: list[int]) -> float:
    """Variance of x0 at the end of DDPM's chain for normal data, from the posterior's formula alone [Ho et al. 2020, Eq. 7]."""
    alpha_bar = schedule.alpha_sigma(torch.tensor(t))[0] ** 2
    variance = 1.0
    for now, before in zip(alpha_bar.tolist(), [*alpha_bar[1:].tolist(), 1.0], strict=True):
        beta = 1 - now / before
        to_data, to_now = before**0.5 * beta / (1 - now), (now / before) ** 0.5 * (1 - before) / (1 - now)
        gain = now**0.5 * SPREAD**2 / (now * SPREAD**2 + 1 - now)
        variance = (to_data * gain + to_now) ** 2 * variance + beta * (1 - before) / (1 - now)
    return variance


@pytest.mark.parametrize("target", TARGET)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps", [10, 100])
def test_ddpm_draws_the_distribution_of_its_chain(name: str, steps: int, target: str) -> None:
    """Mean and variance within four standard errors of 24,000 draws."""
    schedule, prediction, shape = SCHEDULE[name], TARGET[target], (1000, 1, 4, 6)
    draws = torch.Generator().manual_seed(steps)
    fresh = {i: torch.randn(shape, generator=draws, dtype=torch.float64) for i in range(steps + 1)}
    cond = Cond(labels=torch.zeros(1000, dtype=torch.int64))
    x0 = Ddpm(steps)(Ideal(schedule, prediction), schedule, prediction, fresh.__getitem__, cond, torch.float64)
    variance = posterior_chain(schedule, schedule.spaced(steps).tolist())
    count = x0.numel()
    assert x0.var().item() == pytest.approx(variance, abs=4 * variance * (2 / count) ** 0.5)
    # The chain starts from noise of mean 0 instead of alpha_T times the data's: with these schedules less than a hundredth of it is left.
    assert x0.mean().item() == pytest.approx(CENTRE, abs=4 * (variance / count) ** 0.5 + 0.01 * CENTRE)


@pytest.mark.parametrize("name", TABLES)
def test_ddpm_s_whole_chain_ends_in_the_data_s_variance(name: str) -> None:
    few, all_of_them = (posterior_chain(SCHEDULE[name], SCHEDULE[name].spaced(steps).tolist()) for steps in (100, 1000))
    assert few < all_of_them and all_of_them == pytest.approx(SPREAD**2, rel=0.02)


def test_ddpm_is_diffusers_own_with_the_same_noise() -> None:
    """Step by step, DDPMScheduler with the draws that its generator gives it, on a chain of twenty timesteps."""
    schedule, target = SCHEDULE["cosine"], TARGET["x0"]
    t = schedule.spaced(20)
    alpha_bar = schedule.alpha_sigma(t.flip(0))[0] ** 2
    betas = 1 - alpha_bar / torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    theirs = diffusers.DDPMScheduler(
        20, trained_betas=betas.tolist(), prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    theirs.alphas_cumprod = alpha_bar
    theirs.set_timesteps(20)
    model, x = Ideal(schedule, target), noise(0)
    for i, place in enumerate(theirs.timesteps):
        x0 = model(x, t[i].expand(6), COND)
        x = theirs.step(x0, place, x, generator=torch.Generator().manual_seed(i + 1)).prev_sample
    ours = Ddpm(20)(model, schedule, target, noise, COND, torch.float64)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)


def test_eta_goes_from_ddim_to_ddpm() -> None:
    schedule = SCHEDULE["flow"]
    ends = [
        s(Ideal(schedule, TARGET["flow"]), schedule, TARGET["flow"], noise, COND, torch.float64)
        for s in (Ddim(9, 1.0), Ddpm(9), Ddim(9, 0.3))
    ]
    assert torch.equal(ends[0], ends[1]) and not torch.allclose(ends[0], ends[2], atol=1e-3)


@pytest.mark.parametrize("sampler", [Ddim(5, eta=0.5), Ddpm(5), DpmSolver(5)], ids=str)
def test_the_global_generator_is_left_alone_and_steps_are_evaluations(sampler: Sampler) -> None:
    before = torch.get_rng_state()
    schedule, prediction = SCHEDULE["cosine"], TARGET["eps"]
    model = Ideal(schedule, prediction)
    x0 = sampler(model, schedule, prediction, noise, COND, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(model.timesteps) == 5 and model.dtypes == {torch.bfloat16} and x0.dtype == torch.float64


def test_more_steps_than_timesteps_visits_none_twice() -> None:
    schedule = SCHEDULES.build({"name": "cosine", "num_timesteps": 10})
    model = Ideal(schedule, TARGET["v"])
    DpmSolver(50, spacing="trailing")(model, schedule, TARGET["v"], noise, COND, torch.float64)
    assert [t[0].item() for t in model.timesteps] == list(range(9, -1, -1))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm_solver"])
def test_without_diffusers_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what an absent package looks like to import
    with pytest.raises(UserError, match=r"need diffusers .*pip install 'fasttrain\[latents\]', or take heun or euler"):
        SAMPLERS.build(name).require()
    SAMPLERS.build("euler").require()
    SAMPLERS.build("heun").require()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"name": "ddim", "eta": 1.5}, "eta must lie in"),
        ({"name": "ddim", "eta": -0.1}, "eta must lie in"),
        ({"name": "dpm_solver", "order": 4}, "order must be"),
    ],
)
def test_impossible_parameters_are_refused(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMPLERS.build(params)
