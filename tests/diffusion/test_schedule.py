"""Schedules against the papers' numbers."""

import pytest
import torch

from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.weighting import signal_to_noise

ALL = torch.arange(1000)


def snr_of(name: str) -> torch.Tensor:
    return signal_to_noise(*SCHEDULES.build(name).alpha_sigma(ALL))


def first_below(snr: torch.Tensor, limit: float) -> int:
    return int((snr < limit).nonzero()[0])


def test_cosine_alpha_bar_begins_as_published() -> None:
    alpha, _ = SCHEDULES.build("cosine").alpha_sigma(torch.tensor([0]))
    assert alpha.item() ** 2 == pytest.approx(0.9999587158, abs=5e-11)


@pytest.mark.parametrize(("t", "snr"), [(0, 24221.327), (1, 11437.50), (250, 5.4887868), (500, 0.9696096), (999, 2.428767e-09)])
def test_cosine_snr(t: int, snr: float) -> None:
    assert snr_of("cosine")[t].item() == pytest.approx(snr, rel=5e-7)


@pytest.mark.parametrize(
    ("name", "limit", "t"),
    [("cosine", 5, 261), ("cosine", 20, 133), ("cosine", 10, 188), ("cosine", 1, 496), ("linear", 5, 130), ("scaled_linear", 5, 147)],
)
def test_first_timestep_below_an_snr(name: str, limit: float, t: int) -> None:
    assert first_below(snr_of(name), limit) == t


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("num_timesteps", [2, 50, 1000, 4000])
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_schedule_is_variance_preserving_and_loses_signal(name: str, num_timesteps: int, zero_terminal: bool) -> None:
    schedule = SCHEDULES.build({"name": name, "num_timesteps": num_timesteps, "zero_terminal": zero_terminal})
    alpha, sigma = schedule.alpha_sigma(torch.arange(num_timesteps))
    assert alpha.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    assert (alpha.diff() < 0).all() and (sigma > 0).all() and (alpha[:-1] > 0).all()


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_zero_terminal_moves_the_end_and_keeps_the_start(name: str) -> None:
    plain = SCHEDULES.build(name).alpha_sigma(ALL)[0]
    rescaled = SCHEDULES.build({"name": name, "zero_terminal": True}).alpha_sigma(ALL)[0]
    assert rescaled[-1] == 0 and rescaled[0].item() == pytest.approx(plain[0].item(), rel=1e-15)


@pytest.mark.parametrize(("name", "smallest", "largest"), [("cosine", 0.0064254, 20291.17), ("scaled_linear", 0.0292, 14.61)])
def test_edm_limits(name: str, smallest: float, largest: float) -> None:
    assert SCHEDULES.build(name).edm_limits == pytest.approx((smallest, largest), rel=2e-3)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_edm_limits_are_finite_at_zero_terminal_snr(name: str) -> None:
    schedule = SCHEDULES.build({"name": name, "zero_terminal": True})
    t = schedule.nearest(torch.tensor(schedule.edm_limits, dtype=torch.float64))
    assert t.tolist() == [0, 998]


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_nearest_inverts_alpha_sigma(name: str) -> None:
    schedule = SCHEDULES.build(name)
    alpha, sigma = schedule.alpha_sigma(ALL)
    assert torch.equal(schedule.nearest(sigma / alpha), ALL)


def test_timestep_covers_all_and_stays_inside() -> None:
    schedule = SCHEDULES.build({"name": "cosine", "num_timesteps": 7})
    u = torch.tensor([0.0, 1 / 7 - 1e-12, 1 / 7 + 1e-12, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert schedule.timestep(u).tolist() == [0, 0, 1, 3, 6]


def test_one_timestep_is_refused() -> None:
    with pytest.raises(ValueError, match="num_timesteps must be at least 2"):
        SCHEDULES.build({"name": "linear", "num_timesteps": 1})


def test_spec_builds_the_same_schedule_after_its_tables_were_used() -> None:
    schedule = SCHEDULES.build({"name": "linear", "zero_terminal": True})
    schedule.alpha_sigma(ALL)
    assert SCHEDULES.build(SCHEDULES.spec(schedule)) == schedule
