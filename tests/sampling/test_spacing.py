"""Which timesteps samplers visit, and how much of the data's deviation is left by it."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from fasttrain.cond import Cond
from fasttrain.diffusion.schedule import SCHEDULES, Schedule
from fasttrain.sampling.euler import Euler
from fasttrain.sampling.sampler import SAMPLERS
from fasttrain.sampling.spacing import MOST_NOISE, SPACINGS, log_snr
from tests.diffusion.tables import TABLES
from tests.sampling.ideal import SCHEDULE, TARGET, Ideal, deviation

SPACED = ["euler", "ddim", "ddpm", "dpm_solver"]


def edm_sigmas(schedule: Schedule, t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = schedule.alpha_sigma(t)
    return sigma / alpha


# The table of Spaced's docstring: first order trailing, first log_snr, second trailing, second log_snr; each for deviations 0.5 and 0.1.
LEFT = {
    "cosine": (0.969, 0.864, 0.953, 0.951, 1.001, 0.930, 1.002, 1.000),
    "cosine, rescale 2": (0.946, 0.722, 0.956, 0.948, 0.997, 0.762, 1.002, 0.994),
    "scaled_linear": (0.940, 0.585, 0.969, 0.930, 0.971, 0.596, 1.001, 0.964),
    "scaled_linear, rescale 2": (0.850, 0.346, 0.962, 0.835, 0.883, 0.348, 0.995, 0.865),
    "flow": (0.971, 0.914, 0.944, 0.944, 1.003, 1.001, 1.003, 1.003),
    "flow, shift 3": (0.943, 0.777, 0.944, 0.944, 1.009, 0.848, 1.003, 1.003),
}


def named(name: str) -> Schedule:
    base, _, changed = name.partition(", ")
    key, value = changed.split() if changed else ("num_timesteps", "1000")
    return SCHEDULES.build({"name": base, key: float(value) if changed else int(value)})


@pytest.mark.parametrize("sampler", ["euler", "dpm_solver"])
@pytest.mark.parametrize("name", LEFT)
def test_the_deviation_that_is_left_is_as_told(name: str, sampler: str) -> None:
    if sampler == "dpm_solver":
        pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'fasttrain[latents]'")
    made = [
        deviation(SAMPLERS.build({"name": sampler, "steps": 50, "spacing": spacing}), named(name), spread) / spread
        for spacing in ("trailing", "log_snr")
        for spread in (0.5, 0.1)
    ]
    assert made == pytest.approx(LEFT[name][:4] if sampler == "euler" else LEFT[name][4:], abs=6e-4)


@pytest.mark.parametrize(("steps", "most"), [(10, 0.045), (20, 0.02), (50, 0.006)])
@pytest.mark.parametrize("name", LEFT)
def test_dpm_solver_s_default_keeps_the_data_s_deviation(name: str, steps: int, most: float) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'fasttrain[latents]'")
    assert deviation(SAMPLERS.build({"name": "dpm_solver", "steps": steps}), named(name), 0.5) == pytest.approx(0.5, rel=most)


# What previews and sample commands leave, as the configs say, of deviations 0.5 and 0.1; then their papers' samplers, trailing and log_snr.
CONFIGS = {
    "text/256": ("ddim", 1.00, 0.96, 0.94, 0.58, 0.97, 0.93),
    "text/256-local": ("ddim", 1.00, 0.96, 0.94, 0.58, 0.97, 0.93),
    "text/256-flow": ("euler", 1.01, 1.01, 0.95, 0.85, 0.90, 0.90),
    "text/512": ("ddim", 0.995, 0.87, 0.85, 0.35, 0.96, 0.84),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_take_the_sampler_that_leaves_most(name: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'fasttrain[latents]'")
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / f"{name}.yaml").read_text())
    schedule, own = SCHEDULES.build(config["diffusion"]["schedule"]), config["sampling"]["sampler"]
    papers, *told = CONFIGS[name]
    samplers = [own, *({"name": papers, "steps": own["steps"], "spacing": spacing} for spacing in ("trailing", "log_snr"))]
    made = [deviation(SAMPLERS.build(sampler), schedule, spread) / spread for sampler in samplers for spread in (0.5, 0.1)]
    assert made == pytest.approx(told, abs=0.0055)


@pytest.mark.parametrize("name", SCHEDULE)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 400, 5000])
def test_log_snr_goes_from_much_noise_to_the_least_once_each(name: str, steps: int) -> None:
    schedule = SCHEDULE[name]
    t = log_snr(schedule, steps)
    assert edm_sigmas(schedule, t[:1]).item() == pytest.approx(min(schedule.edm_limits[1], MOST_NOISE), rel=0.02)
    assert len(t) <= steps and (t.diff() < 0).all()
    if steps > 1:
        assert edm_sigmas(schedule, t[-1:]).item() == pytest.approx(schedule.edm_limits[0])


def test_log_snr_is_even_in_continuous_time() -> None:
    """Equal ratios of sigma / alpha from 80 to 1/1000."""
    sigmas = edm_sigmas(SCHEDULE["flow"], log_snr(SCHEDULE["flow"], 21))
    expected = torch.tensor([MOST_NOISE * (1e-3 / MOST_NOISE) ** (i / 20) for i in range(21)], dtype=torch.float64)
    torch.testing.assert_close(sigmas, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TABLES)
def test_log_snr_is_as_even_as_a_table_allows(name: str) -> None:
    schedule = SCHEDULE[name]
    least, most = schedule.edm_limits
    sigmas = edm_sigmas(schedule, log_snr(schedule, 12))
    wanted = torch.linspace(math.log(min(most, MOST_NOISE)), math.log(least), 12, dtype=torch.float64)
    assert len(sigmas) == 12 and (sigmas.log() - wanted).abs().max() < 0.1


@pytest.mark.parametrize("name", TABLES)
def test_log_snr_begins_where_no_data_is_left(name: str) -> None:
    schedule = SCHEDULES.build({"name": name, "zero_terminal": True})
    t = log_snr(schedule, 10)
    assert t[0] == 999 and len(t) == 10
    x0 = Euler(10, spacing="log_snr")(
        Ideal(schedule, TARGET["v"]),
        schedule,
        TARGET["v"],
        lambda draw: torch.ones(6, 1, 4, 4).double(),
        Cond(torch.zeros(6).long()),
        torch.float64,
    )
    assert x0.isfinite().all()


def test_more_steps_than_timesteps() -> None:
    schedule = SCHEDULES.build({"name": "cosine", "num_timesteps": 10})
    assert log_snr(schedule, 500).tolist() == list(range(8, -1, -1)), "the last is of more noise than MOST_NOISE"


@pytest.mark.parametrize("name", SPACED)
def test_every_such_sampler_takes_either_spacing_and_tells_the_choices(name: str) -> None:
    for spacing in SPACINGS:
        sampler = SAMPLERS.build({"name": name, "steps": 5, "spacing": spacing})
        assert torch.equal(sampler.timesteps(SCHEDULE["flow"]), SPACINGS[spacing](SCHEDULE["flow"], 5))
        assert SAMPLERS.build(SAMPLERS.spec(sampler)) == sampler
    with pytest.raises(ValueError, match="unknown spacing 'log-snr'; did you mean 'log_snr'"):
        SAMPLERS.build({"name": name, "spacing": "log-snr"})
