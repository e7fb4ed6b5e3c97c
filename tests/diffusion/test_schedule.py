"""Schedules against the papers' numbers."""

import math

import pytest
import torch

from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.weighting import signal_to_noise
from tests.diffusion.tables import TABLES

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


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("num_timesteps", [2, 50, 1000, 4000])
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_schedule_is_variance_preserving_and_loses_signal(name: str, num_timesteps: int, zero_terminal: bool) -> None:
    schedule = SCHEDULES.build({"name": name, "num_timesteps": num_timesteps, "zero_terminal": zero_terminal})
    alpha, sigma = schedule.alpha_sigma(torch.arange(num_timesteps))
    assert alpha.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    assert (alpha.diff() < 0).all() and (sigma > 0).all() and (alpha[:-1] > 0).all()


@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_moves_the_end_and_keeps_the_start(name: str) -> None:
    plain = SCHEDULES.build(name).alpha_sigma(ALL)[0]
    rescaled = SCHEDULES.build({"name": name, "zero_terminal": True}).alpha_sigma(ALL)[0]
    assert rescaled[-1] == 0 and rescaled[0].item() == pytest.approx(plain[0].item(), rel=1e-15)


@pytest.mark.parametrize(("name", "smallest", "largest"), [("cosine", 0.0064254, 20291.17), ("scaled_linear", 0.0292, 14.61)])
def test_edm_limits(name: str, smallest: float, largest: float) -> None:
    assert SCHEDULES.build(name).edm_limits == pytest.approx((smallest, largest), rel=2e-3)


@pytest.mark.parametrize("name", TABLES)
def test_edm_limits_are_finite_at_zero_terminal_snr(name: str) -> None:
    schedule = SCHEDULES.build({"name": name, "zero_terminal": True})
    t = schedule.nearest(torch.tensor(schedule.edm_limits, dtype=torch.float64))
    assert t.tolist() == [0, 998]


@pytest.mark.parametrize("name", TABLES)
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


def alpha_bar(name: str, **params: object) -> torch.Tensor:
    return SCHEDULES.build({"name": name, **params}).alpha_sigma(ALL)[0] ** 2


@pytest.mark.parametrize(("before", "old", "new", "after"), [(0.5, 1, 2, 0.2), (0.8, 1, 2, 0.5), (0.5, 2, 1, 0.8), (0.9, 3, 4, 8.1 / 9.7)])
def test_the_rescale_by_hand(before: float, old: float, new: float, after: float) -> None:
    """Eq. 3: old^2 ab / (new^2 + ab (old^2 - new^2)), e.g. 0.5 / (4 - 1.5) = 0.2; at the table's timestep whose alpha_bar is nearest."""
    plain, rescaled = alpha_bar("cosine"), alpha_bar("cosine", rescale=new / old)
    i = (plain - before).abs().argmin()
    assert plain[i].item() == pytest.approx(before, abs=1e-3)
    assert rescaled[i].item() == pytest.approx(after, abs=2e-3)
    exact = old**2 * plain / (new**2 + plain * (old**2 - new**2))
    torch.testing.assert_close(rescaled, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", TABLES)
def test_the_rescale_keeps_its_ends_divides_the_snr_and_composes(name: str) -> None:
    twice = SCHEDULES.build({"name": name, "rescale": 2.0, "zero_terminal": True}).alpha_sigma(ALL)
    assert twice[0][-1] == 0 and twice[1][-1] == 1
    torch.testing.assert_close(twice[0] ** 2 + twice[1] ** 2, torch.ones(1000).double(), rtol=0, atol=1e-15)
    assert torch.equal(alpha_bar(name, rescale=1.0), alpha_bar(name))
    plain, one, other, both = (
        signal_to_noise(*SCHEDULES.build({"name": name, "rescale": r}).alpha_sigma(ALL)) for r in (1.0, 2.0, 3.0, 6.0)
    )
    torch.testing.assert_close(one, plain / 4, rtol=1e-12, atol=0)
    torch.testing.assert_close(both, one * other / plain, rtol=1e-12, atol=0)


def test_flow_s_shift_is_the_same_rescale_of_the_snr() -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    plain, shifted = (SCHEDULES.build({"name": "flow", "shift": s}) for s in (1.0, 2.5))
    snr, moved = (signal_to_noise(*schedule.alpha_sigma(schedule.timestep(u))) for schedule in (plain, shifted))
    torch.testing.assert_close(moved, snr / 2.5**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("u", "shift", "t"), [(0.25, 1, 250), (0.5, 3, 750), (0.25, 3, 500), (0.9, 3, 2700 / 2.8), (0.5, 0.5, 1000 / 3)])
def test_flow_s_timesteps_by_hand(u: float, shift: float, t: float) -> None:
    """Stable Diffusion 3's shift s u / (1 + (s - 1) u), e.g. 1.5 / 2 = 0.75, in thousandths, as its model is told the time."""
    schedule = SCHEDULES.build({"name": "flow", "shift": shift})
    assert schedule.timestep(torch.tensor([u], dtype=torch.float64)).item() == pytest.approx(t, rel=1e-12)


@pytest.mark.parametrize("num_timesteps", [2, 3, 1000, 1023, 1024, 1025, 4000])
@pytest.mark.parametrize("shift", [0.01, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("ranges", [1, 3, 10, 1000])
def test_flow_never_draws_its_ends(num_timesteps: int, shift: float, ranges: int) -> None:
    schedule = SCHEDULES.build({"name": "flow", "num_timesteps": num_timesteps, "shift": shift})
    t = schedule.timestep(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    alpha, sigma = schedule.alpha_sigma(t)
    assert (alpha > 0).all() and (sigma > 0).all() and t[1] < num_timesteps
    # As the objective tells the ranges of timesteps apart.
    assert torch.div(t * ranges, num_timesteps, rounding_mode="floor").tolist() == [0, ranges - 1]


def test_flow_s_nearest_inverts_alpha_sigma() -> None:
    schedule = SCHEDULES.build("flow")
    t = torch.linspace(1, 999, 50, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(schedule.nearest(sigma / alpha), t, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "steps", "expected"), [("cosine", 4, [999, 749, 499, 249]), ("linear", 3, [999, 666, 332])])
def test_spaced_timesteps_end_in_noise(name: str, steps: int, expected: list[int]) -> None:
    assert SCHEDULES.build(name).spaced(steps).tolist() == expected


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps", [1000, 5000])
def test_spaced_timesteps_are_each_visited_once(name: str, steps: int) -> None:
    assert SCHEDULES.build(name).spaced(steps).tolist() == list(range(999, -1, -1))


def test_flow_s_spaced_timesteps_are_shifted_within_its_limits() -> None:
    least, most = 1000 * 1e-3 / 1.001, 1000 * 1e3 / 1001
    assert SCHEDULES.build("flow").spaced(4).tolist() == pytest.approx([most, 750, 500, 250])
    assert SCHEDULES.build({"name": "flow", "shift": 3.0}).spaced(2).tolist() == pytest.approx([most, 750])
    assert SCHEDULES.build({"name": "flow", "shift": 0.001}).spaced(2).tolist() == pytest.approx([most, least])


@pytest.mark.parametrize(("name", "key"), [("cosine", "rescale"), ("flow", "shift")])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e6])
def test_impossible_ratios_are_refused(name: str, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} is a ratio of image sizes"):
        SCHEDULES.build({"name": name, key: value})
