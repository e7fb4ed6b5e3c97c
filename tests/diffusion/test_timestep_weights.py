"""Weights by range of timesteps: which timestep gets which, under every schedule; and timesteps of one range."""

import pytest
import torch

from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.timestep_weights import Pareto, Table, placed
from fasttrain.diffusion.timesteps import TIMESTEPS
from fasttrain.diffusion.weighting import WEIGHTINGS, MinSnr, signal_to_noise
from fasttrain.diffusion.window import Window
from tests.diffusion.tables import TABLES

SEED = torch.tensor(7)


@pytest.mark.parametrize("ranges", [1, 2, 7, 10, 57, 1000])
@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_each_timestep_has_the_weight_of_its_range(name: str, zero_terminal: bool, ranges: int) -> None:
    schedule = SCHEDULES.build({"name": name, "zero_terminal": zero_terminal})
    t = torch.arange(1000)
    table = placed(Table(tuple(float(k + 1) for k in range(ranges))), schedule)
    assert torch.equal(table(signal_to_noise(*schedule.alpha_sigma(t))), (t * ranges // 1000 + 1).double())


def test_each_real_timestep_has_the_weight_of_its_range() -> None:
    schedule = SCHEDULES.build("flow")
    t = torch.linspace(0.01, 999.99, 4999, dtype=torch.float64)
    table = placed(Table((1.0, 2.0, 3.0, 4.0)), schedule)
    assert torch.equal(table(signal_to_noise(*schedule.alpha_sigma(t))), (t * 4 / 1000).floor() + 1)


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


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.2), (0.0, 1.0), (0.9, 1.0), (0.57, 0.58)])
def test_a_window_draws_every_timestep_of_its_range_and_no_other(low: float, high: float, stratified: bool) -> None:
    u = TIMESTEPS.build({"name": "window", "low": low, "high": high, "stratified": stratified}).draw(SEED, torch.arange(40_000))
    t = SCHEDULES.build("cosine").timestep(u)
    assert sorted(set(t.tolist())) == list(range(round(low * 1000), round(high * 1000)))
    within = (u - low) / (high - low)
    assert float(within.mean()) == pytest.approx(0.5, abs=0.01) and float(within.var()) == pytest.approx(1 / 12, abs=0.002)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.3, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_impossible_windows_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low and high"):
        Window(low, high)
