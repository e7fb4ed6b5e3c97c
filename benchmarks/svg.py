"""Small pictures as SVG text: grouped bars and lines. Written here because no drawing library is among the dependencies."""

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

COLOURS = ("#9aa5b1", "#5b8def", "#e4572e", "#2a9d8f", "#b5179e", "#6d597a", "#f4a261")
FONT = 'font-family="Helvetica, Arial, sans-serif"'
WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 860, 13, 14, 250, 70, 64

Point = tuple[float, float]


def bars(title: str, groups: Sequence[tuple[str, Mapping[str, float]]], unit: str, most: float | None = None) -> str:
    """Horizontal bars: a group a row, a bar and its value for each name in it.

    Args:
        groups: (label, value by name); names keep one colour throughout.
        unit: behind every value.
        most: the axis' end; the largest value by default.
    """
    names = list(dict.fromkeys(name for _, values in groups for name in values))
    most = most or max((value for _, values in groups for value in values.values()), default=1.0) or 1.0
    parts, y = [*_legend(names)], float(TOP)
    for label, values in groups:
        parts.append(_text(LEFT - 10, y + BAR * max(1, len(values)) / 2 + 4, label, "end"))
        for name, value in values.items():
            length = max(0.0, (WIDTH - LEFT - RIGHT) * min(value, most) / most)
            parts.append(f'<rect x="{LEFT}" y="{y:.1f}" width="{length:.1f}" height="{BAR - 2}" fill="{_colour(names, name)}"/>')
            parts.append(_text(LEFT + length + 5, y + BAR - 4, f"{value:.3g}{unit}", "start", 10))
            y += BAR
        y += GAP
    return _picture(title, y + 6, parts)


def lines(title: str, panels: Sequence[tuple[str, Mapping[str, Sequence[Point]], bool]]) -> str:
    """Panels of lines, one below another.

    Args:
        panels: (title, points by name, whether y is logarithmic); points that are not finite, or not positive on a logarithmic axis,
            are left out.
    """
    names = list(dict.fromkeys(name for _, series, _ in panels for name in series))
    parts, top = [*_legend(names)], float(TOP)
    for label, series, logarithmic in panels:
        parts += _panel(label, series, logarithmic, top, names)
        top += 230
    return _picture(title, top, parts)


def _panel(label: str, series: Mapping[str, Sequence[Point]], logarithmic: bool, top: float, names: list[str]) -> list[str]:
    drawn = {name: [(x, _scaled(y, logarithmic)) for x, y in points if _shown(y, logarithmic)] for name, points in series.items()}
    points = [point for line in drawn.values() for point in line] or [(0.0, 0.0)]
    (x_low, x_high), (y_low, y_high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    left, right, height = 90.0, WIDTH - 20.0, 180.0

    def place(point: Point) -> str:
        x = left + (right - left) * (point[0] - x_low) / ((x_high - x_low) or 1)
        y = top + 14 + height * (1 - (point[1] - y_low) / ((y_high - y_low) or 1))
        return f"{x:.1f},{y:.1f}"

    parts = [f'<rect x="{left}" y="{top + 14}" width="{right - left}" height="{height}" fill="none" stroke="#cccccc"/>']
    parts.append(_text(left, top + 8, label, "start"))
    for value, y in ((y_high, top + 24), (y_low, top + 14 + height)):
        parts.append(_text(left - 6, y, f"{10**value if logarithmic else value:.3g}", "end", 10))
    parts.append(_text(left, top + height + 28, f"{x_low:g}", "start", 10))
    parts.append(_text(right, top + height + 28, f"{x_high:g}", "end", 10))
    for name, line in drawn.items():
        route = " ".join(map(place, line))
        parts.append(f'<polyline points="{route}" fill="none" stroke="{_colour(names, name)}" stroke-width="1.5"/>')
    return parts


def _shown(y: float, logarithmic: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not logarithmic)


def _scaled(y: float, logarithmic: bool) -> float:
    return math.log10(y) if logarithmic else y


def _legend(names: list[str]) -> list[str]:
    parts, x = [], 20.0
    for name in names:
        parts.append(f'<rect x="{x:.0f}" y="38" width="11" height="11" fill="{_colour(names, name)}"/>')
        parts.append(_text(x + 16, 48, name, "start"))
        x += 34 + 6.6 * len(name)
    return parts


def _colour(names: list[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#222222" {FONT}>{escape(text)}</text>'


def _picture(title: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}">'
    name = f'<text x="20" y="24" font-size="15" font-weight="bold" fill="#222222" {FONT}>{escape(title)}</text>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', name, *parts, "</svg>"]) + "\n"
