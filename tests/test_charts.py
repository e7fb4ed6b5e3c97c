"""Charts: what lies on an axis, what is drawn, what is left out."""

import math

import numpy as np
import pytest
from PIL import Image

from fasttrain.charts import COLOURS, Axis, Heat, Line, Panel, heat_chart, line_chart


def _coloured(path, colour):
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return np.argwhere((np.asarray(Image.open(path)) == wanted).all(-1))


def test_a_value_lies_where_the_axis_says():
    assert Axis(1, 100, True).share(10) == pytest.approx(0.5)
    assert Axis(0, 4, False).share(1) == pytest.approx(0.25)
    assert Axis(1, 100, True).share(0) is None and Axis(1, 100, False).share(math.nan) is None
    assert Axis.over([3.0], True) == Axis(1.5, 6.0, True) and Axis.over([math.inf], False) == Axis(1.0, 10.0, False)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("value", [1.0, 3e-9, 7.5, 1e20])
def test_values_that_differ_by_rounding_alone_are_shown(tmp_path, value, log):
    values = [value, math.nextafter(value, math.inf)]
    axis = Axis.over(values, log)
    assert all(0.2 < axis.share(number) < 0.8 for number in values) and axis.ticks()
    line_chart(tmp_path / "chart.png", "t", [Panel("p", [Line("flat", [(v, v) for v in values])], log_x=log, log_y=log)])


@pytest.mark.parametrize("axis", [Axis(0.0013, 7.1, True), Axis(1.1, 1.3, True), Axis(-3, 17, False), Axis(512, 1e6, True)])
def test_ticks_lie_within_the_axis(axis):
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 14 and all(axis.low <= tick <= axis.high for tick in ticks)


def test_a_rising_line_rises_and_a_gap_is_not_bridged(tmp_path):
    rising = Line("rising", [(1, 1), (10, 10)], band=[(1, 0.5, 2), (10, 5, 20)])
    line_chart(tmp_path / "chart.png", "t", [Panel("p", [rising], log_x=True, log_y=True)])
    rows = _coloured(tmp_path / "chart.png", COLOURS[0])
    rows = rows[rows[:, 0] > 100]  # below the legend
    left, right = rows[rows[:, 1].argmin()], rows[rows[:, 1].argmax()]
    assert left[0] > right[0] and right[1] - left[1] > 400
    gap = Line("gap", [(0, 1), (1, 1), (2, math.nan), (3, 1), (4, 1)])
    line_chart(tmp_path / "gap.png", "t", [Panel("p", [gap])])
    columns = np.unique(_coloured(tmp_path / "gap.png", COLOURS[0])[:, 1])
    assert np.diff(columns).max() > 200


def test_many_names_and_panels_and_nothing_to_show(tmp_path):
    lines = [Line(f"a rather long name of a line {i}", [(i, math.inf)]) for i in range(12)]
    line_chart(tmp_path / "chart.png", "t", [Panel("p", lines, log_y=True)] * 3)
    assert Image.open(tmp_path / "chart.png").size[0] == 1280


def test_a_colour_that_comes_again_is_hollow_and_thin(tmp_path):
    lines = [Line(f"line {i}", [(0, i), (1, i)]) for i in range(len(COLOURS) + 1)]
    line_chart(tmp_path / "chart.png", "t", [Panel("p", lines)])
    drawn = _coloured(tmp_path / "chart.png", COLOURS[0])
    widths = np.bincount(drawn[drawn[:, 1] == 350, 0])  # half-way between the marks
    assert sorted(np.diff(np.flatnonzero(widths)).tolist())[:1] == [1] and widths.sum() == 3, "a line of two pixels and one of one"
    legend = drawn[drawn[:, 0] < 100]
    first, again = (np.count_nonzero(legend[:, 0] < 60), np.count_nonzero(legend[:, 0] >= 60))
    assert 0 < again < first


def test_a_long_title_is_shown_to_its_end(tmp_path):
    """On two lines, between the margins: cut off at the picture's edge, ink would reach it, and both would be alike."""
    line_chart(tmp_path / "long.png", "a way of training " * 9 + "first", [Panel("p", [])])
    line_chart(tmp_path / "other.png", "a way of training " * 9 + "other", [Panel("p", [])])
    long, other = (np.asarray(Image.open(tmp_path / name).convert("L"))[:44] for name in ("long.png", "other.png"))
    inked = np.flatnonzero((long < 128).any(axis=0))
    assert inked.min() >= 20 and inked.max() < 640 - 20
    rows = np.flatnonzero((long != other).any(axis=1))
    assert rows.min() > 20 and rows.max() < 43


def test_heat_is_red_above_zero_blue_below_and_white_without_a_value(tmp_path):
    heat_chart(tmp_path / "heat.png", "t", [Heat("h", [[1.0, -2.0], [math.nan, 0.0]], ["r1", "r2"], ["c1", "c2"])])
    # Of the largest absolute value, -2: half a red, a whole blue.
    assert len(_coloured(tmp_path / "heat.png", "#ff9f9f")) > 500 and len(_coloured(tmp_path / "heat.png", "#4040ff")) > 500


def test_heat_from_the_least_value_is_white_there(tmp_path):
    heat_chart(tmp_path / "heat.png", "t", [Heat("h", [[20.0, 22.0], [math.nan, 24.0]], ["r1", "r2"], ["c1", "c2"], from_least=True)])
    assert Heat("h", [[20.0, 22.0, 24.0]], ["r"], ["a", "b", "c"], from_least=True).shares() == [[0.0, 0.5, 1.0]]
    assert Heat("h", [[7.0]], ["r"], ["a"], from_least=True).shares() == [[0.0]]
    assert len(_coloured(tmp_path / "heat.png", "#ff9f9f")) > 500 and len(_coloured(tmp_path / "heat.png", "#ff4040")) > 500
