"""The pictures are well-formed, and their bars and lines as long as the values say."""

import math
import re
from xml.etree import ElementTree

from benchmarks.svg import bars, lines

SVG = "{http://www.w3.org/2000/svg}"


def _bar_lengths(picture: str) -> list[float]:
    rectangles = ElementTree.fromstring(picture).findall(f"{SVG}rect")
    return [float(r.get("width", "0")) for r in rectangles if r.get("height") == "11" and r.get("width") != "11"]


def test_bars_are_as_long_as_their_values() -> None:
    picture = bars("a < b & c", [("first", {"eager": 50.0, "ours": 100.0}), ("second", {"ours": 25.0})], " %")
    half, whole, quarter = _bar_lengths(picture)
    assert math.isclose(half, whole / 2, abs_tol=0.1) and math.isclose(quarter, whole / 4, abs_tol=0.1)
    assert "a &lt; b &amp; c" in picture and "100 %" in picture


def test_one_name_keeps_its_colour() -> None:
    picture = bars("", [("first", {"eager": 1.0, "ours": 2.0}), ("second", {"ours": 1.0})], "")
    colours = re.findall(r'height="11" fill="(#\w+)"', picture)
    assert colours == [colours[0], colours[1], colours[0], colours[1], colours[1]]  # two in the legend, then the bars


def test_lines_leave_out_what_a_logarithm_cannot_show() -> None:
    picture = lines("t", [("p", {"a": [(1, 1.0), (2, 0.0), (3, 100.0), (4, math.nan)]}, True)])
    [route] = [line.get("points", "") for line in ElementTree.fromstring(picture).findall(f"{SVG}polyline")]
    assert len(route.split()) == 2


def test_nothing_to_draw_is_still_a_picture() -> None:
    ElementTree.fromstring(bars("empty", [], ""))
    ElementTree.fromstring(lines("empty", [("none", {}, False)]))
