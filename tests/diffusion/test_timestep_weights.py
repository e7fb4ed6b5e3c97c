"""Weights by range of timesteps: which timestep gets which, under every schedule; and timesteps of one range."""

import math
from typing import Any, Literal

import pytest
import torch

from fasttrain.diffusion.schedule import SCHEDULES, Schedule
from fasttrain.diffusion.timestep_weights import Pareto, Table, placed
from fasttrain.diffusion.timesteps import TIMESTEPS, drawn_on
from fasttrain.diffusion.weighting import WEIGHTINGS, MinSnr, signal_to_noise
from fasttrain.diffusion.window import Window
from fasttrain.errors import UserError
from tests.diffusion.tables import REAL, TABLES

SEED = torch.tensor(7)


@pytest.mark.parametrize("ranges", [1, 2, 7, 10, 57, 1000])
@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_each_timestep_has_the_weight_of_its_range(name: str, zero_terminal: bool, ranges: int) -> None:
    schedule = SCHEDULES.build({"name": name, "zero_terminal": zero_terminal})
    t = torch.arange(1000)
    table = placed(Table(tuple(float(k + 1) for k in range(ranges))), schedule)
    assert torch.equal(table(signal_to_noise(*schedule.alpha_sigma(t))), (t * ranges // 1000 + 1).double())


@pytest.mark.parametrize("ranges", [2, 4, 7, 1000])
@pytest.mark.parametrize("spec", REAL, ids=str)
def test_each_real_timestep_has_the_weight_of_its_range(spec: dict[str, Any], ranges: int) -> None:
    schedule = SCHEDULES.build(spec)
    t = torch.linspace(0.013, 999.987, 4999, dtype=torch.float64)
    table = placed(Table(tuple(float(k + 1) for k in range(ranges))), schedule)
    assert torch.equal(table(signal_to_noise(*schedule.alpha_sigma(t))), (t * ranges / 1000).floor() + 1)


@pytest.mark.parametrize("shape", ["step", "linear"])
@pytest.mark.parametrize("name", TABLES)
def test_a_weight_for_each_timestep_up_to_one_without_data(name: str, shape: Literal["step", "linear"]) -> None:
    schedule = SCHEDULES.build({"name": name, "zero_terminal": True})
    table = placed(Table(tuple(float(k + 1) for k in range(1000)), shape), schedule)
    torch.testing.assert_close(table(signal_to_noise(*schedule.alpha_sigma(torch.arange(1000)))), torch.arange(1000).double() + 1)


def test_more_weights_than_timesteps_are_refused() -> None:
    with pytest.raises(UserError, match="3 ranges of 2 timesteps"):
        placed(Table((1.0, 2.0, 3.0)), SCHEDULES.build({"name": "cosine", "num_timesteps": 2}))


def test_a_linear_table_meets_its_weights_at_the_ranges_middles_and_is_straight_over_log_snr() -> None:
    schedule = SCHEDULES.build("cosine")
    snr = signal_to_noise(*schedule.alpha_sigma(torch.arange(1000)))
    w = placed(Table((1.0, 2.0, 4.0, 0.0), shape="linear"), schedule)(snr)
    assert [float(w[t]) for t in (0, 125, 375, 625, 875, 999)] == pytest.approx([1, 1, 2, 4, 0, 0])
    between = snr[375:626].log()
    straight = 2 + 2 * (between - between[0]) / (between[-1] - between[0])
    torch.testing.assert_close(w[375:626], straight)


def test_weightings_of_snr_stay_as_they_are() -> None:
    weighting = MinSnr()
    assert placed(weighting, SCHEDULES.build("cosine")) is weighting


def test_a_table_of_several_weights_is_nothing_without_a_schedule() -> None:
    with pytest.raises(TypeError, match="schedule"):
        Table((1.0, 2.0))(torch.ones(1))


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_impossible_tables_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        WEIGHTINGS.build({"name": "table", "weights": weights})


@pytest.mark.parametrize(
    "params", [{"ranges": 1}, {"every": 0}, {"samples": 3}, {"regularisation": -1}, {"rate": 0}, {"iterations": 0}, {"solver": "adam"}]
)
def test_impossible_solutions_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        WEIGHTINGS.build({"name": "pareto", **params})


def test_before_it_is_solved_for_all_weights_are_1() -> None:
    assert Pareto()(torch.tensor([0.0, 3.0, 1e9])).tolist() == [1, 1, 1]


def drawn(schedule: Schedule, low: float, high: float, stratified: bool = True) -> torch.Tensor:
    window = TIMESTEPS.build({"name": "window", "low": low, "high": high, "stratified": stratified})
    return drawn_on(window, schedule).draw(SEED, torch.arange(40_000))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.2), (0.0, 1.0), (0.9, 1.0), (0.57, 0.58), (0.07, 0.29), (1 / 7, 2 / 7)])
@pytest.mark.parametrize("spec", [*TABLES, {"name": "cosine", "num_timesteps": 100}], ids=str)
def test_a_window_draws_every_timestep_of_its_range_and_no_other(spec: Any, low: float, high: float, stratified: bool) -> None:
    schedule = SCHEDULES.build(spec)
    u, timesteps = drawn(schedule, low, high, stratified), schedule.num_timesteps
    first, last = math.ceil(low * timesteps - 1e-6), math.ceil(high * timesteps - 1e-6) - 1
    assert sorted(set(schedule.timestep(u).tolist())) == list(range(first, last + 1))
    within = (u - first / timesteps) / ((last + 1 - first) / timesteps)
    assert float(within.mean()) == pytest.approx(0.5, abs=0.01) and float(within.var()) == pytest.approx(1 / 12, abs=0.002)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.2), (0.0, 0.1), (0.9, 1.0), (0.57, 0.58), (1 / 7, 2 / 7)])
@pytest.mark.parametrize("spec", REAL, ids=str)
def test_a_window_on_a_continuous_path_is_one_of_its_timesteps(spec: dict[str, Any], low: float, high: float, stratified: bool) -> None:
    """And within it the draws are the schedule's own: those of all of its draws that fall there."""
    schedule = SCHEDULES.build(spec)
    t = schedule.timestep(drawn(schedule, low, high, stratified)) / 1000
    rounding = 1e-11
    assert float(t.min()) >= low - rounding and float(t.max()) < high + rounding
    every = schedule.timestep((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000) / 1000
    own = every[(every >= low) & (every < high)]
    if len(own) > 1000:
        assert float(t.mean()) == pytest.approx(float(own.mean()), abs=0.03 * (high - low))


def test_the_ranges_of_a_path_take_up_all_of_its_draws() -> None:
    for schedule in map(SCHEDULES.build, (*TABLES, *REAL)):
        stretches = [Window(k / 7, (k + 1) / 7).on(schedule) for k in range(7)]
        assert stretches[0].low == 0 and stretches[-1].high == 1
        assert [a.high for a in stretches[:-1]] == [b.low for b in stretches[1:]]


def test_a_window_that_is_never_drawn_is_refused() -> None:
    for spec, low, high in (({"name": "cosine"}, 0.5001, 0.5003), ({"name": "edm", "std": 0.1}, 0.9, 0.95)):
        with pytest.raises(UserError, match="draws no timestep between"):
            Window(low, high).on(SCHEDULES.build(spec))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.3, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_impossible_windows_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low and high"):
        Window(low, high)
