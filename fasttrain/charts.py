"""Charts as PNG: panels of lines with bands, and matrices as heat maps. Drawn with PIL, since no drawing library is a dependency."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fasttrain.files import write_whole

COLOURS = ("#5b8def", "#e4572e", "#2a9d8f", "#b5179e", "#6d597a", "#f4a261", "#9aa5b1", "#264653", "#8ab17d", "#bc6c25")
INK, FAINT, PAPER = "#222222", "#d5d9de", "#ffffff"
WIDTH, HEIGHT = 640, 400  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 76, 32, 44, 52  # its margins
HEAD, LEGEND_ROW = 44, 20
CELL, LABELS = 56, 150
MOST_TICKS = 6
NARROWEST = 1e-9  # of an axis, relative to its values

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named line, and the band around it as (x, low, high). Points that an axis cannot show are left out."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Panel:
    """Lines on common axes; a name has one colour in all panels of a chart. Where colours come again, marks are hollow and lines thin."""

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False

    @cached_property
    def x(self) -> "Axis":
        return Axis.over([x for line in self.lines for x, _ in line.points], self.log_x)

    @cached_property
    def y(self) -> "Axis":
        ends = [end for line in self.lines for _, *both in line.band for end in both]
        return Axis.over([*(y for line in self.lines for _, y in line.points), *ends], self.log_y)


@dataclass(frozen=True)
class Heat:
    """A matrix [R][C] with names for its rows and columns; values that are not finite stay white.

    Colours diverge around 0: red above it, blue below. With `from_least` they run from white, at the least value, to red: for values whose
    sign says nothing.
    """

    title: str
    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    from_least: bool = False

    def shares(self) -> list[list[float]]:
        """How far each value goes towards a whole colour, -1 to 1; NaN where it is not finite."""
        shown = [value for row in self.values for value in row if math.isfinite(value)]
        low = min(shown, default=0.0) if self.from_least else 0.0
        most = max((abs(value - low) for value in shown), default=0.0) or 1.0
        return [[(value - low) / most if math.isfinite(value) else math.nan for value in row] for row in self.values]


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool) -> "Axis":
        """The axis that shows all of the values that it can show."""
        shown = [value for value in values if _can_show(value, log)]
        low, high = (min(shown), max(shown)) if shown else (1.0, 10.0)
        size = max(abs(low), abs(high))
        if high - low <= NARROWEST * size:  # one value, or as good as one: rounding would leave nothing to divide by
            low, high = (low / 2, high * 2) if log else (low - max(0.5, size / 2), high + max(0.5, size / 2))
        return cls(low, high, log)

    def share(self, value: float) -> float | None:
        """Where a value lies, 0 at `low` and 1 at `high`; None where the axis cannot show it."""
        if not _can_show(value, self.log):
            return None
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within the range, a few."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def line_chart(path: Path, title: str, panels: Sequence[Panel], columns: int = 2) -> None:
    """Writes the panels, `columns` in a row, under one legend."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    columns = max(1, min(columns, len(panels)))
    places = _legend_places(names, columns * WIDTH)
    top = HEAD + LEGEND_ROW * (1 + max((row for _, row in places), default=0))
    picture = Image.new("RGB", (columns * WIDTH, top + HEIGHT * math.ceil(len(panels) / columns)), PAPER)
    pen = ImageDraw.Draw(picture, "RGBA")
    _title(pen, title, picture.width)
    for name, (x, row) in zip(names, places, strict=True):
        y = HEAD + LEGEND_ROW * row
        _swatch(pen, (x, y, x + 11, y + 11), names, name)
        pen.text((x + 16, y - 2), name, INK, _font(12))
    for number, panel in enumerate(panels):
        _panel(pen, panel, names, (number % columns * WIDTH, top + number // columns * HEIGHT))
    _save(path, picture)


def heat_chart(path: Path, title: str, heats: Sequence[Heat]) -> None:
    """Writes the matrices, one below another, each coloured by its own values."""
    width = max((LABELS + CELL * len(heat.columns) + 20 for heat in heats), default=LABELS)
    picture = Image.new("RGB", (max(width, 480), HEAD + sum(map(_heat_height, heats))), PAPER)
    pen, top = ImageDraw.Draw(picture), HEAD
    _title(pen, title, picture.width)
    for heat in heats:
        _heat(pen, heat, top)
        top += _heat_height(heat)
    _save(path, picture)


def _title(pen: ImageDraw.ImageDraw, title: str, width: int) -> None:
    """As large as fits above the picture on one line, or else smaller on two."""
    for size, most in [*((size, 1) for size in range(18, 13, -1)), *((size, 2) for size in range(13, 8, -1))]:
        lines = _wrapped(title, _font(size), width - 40)
        if len(lines) <= most:
            break
    for row, line in enumerate(lines):
        pen.text((20, 12 - 6 * (len(lines) > 1) + (size + 3) * row), line, INK, _font(size))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """A text's words in lines, each as long as the width lets it be."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _panel(pen: ImageDraw.ImageDraw, panel: Panel, names: list[str], corner: tuple[int, int]) -> None:
    left, top = corner[0] + LEFT, corner[1] + TOP
    right, bottom = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM

    def place(x: float, y: float) -> Point | None:
        across, up = panel.x.share(x), panel.y.share(y)
        return None if across is None or up is None else (left + (right - left) * across, bottom - (bottom - top) * up)

    for value in panel.x.ticks():
        x = left + (right - left) * (panel.x.share(value) or 0.0)
        pen.line((x, top, x, bottom), FAINT)
        pen.text((x, bottom + 4), _number(value), INK, _font(11), anchor="mt")
    for value in panel.y.ticks():
        y = bottom - (bottom - top) * (panel.y.share(value) or 0.0)
        pen.line((left, y, right, y), FAINT)
        pen.text((left - 6, y), _number(value), INK, _font(11), anchor="rm")
    pen.rectangle((left, top, right, bottom), outline=INK)
    pen.text((left, top - 8), panel.title, INK, _font(13), anchor="ls")
    pen.text(((left + right) / 2, bottom + 24), panel.x_label, INK, _font(12), anchor="mt")
    pen.text((corner[0] + 4, top - 24), panel.y_label, INK, _font(12), anchor="ls")
    for line in panel.lines:
        colour = _colour(names, line.name)
        lows, highs = ([place(x, (low, high)[end]) for x, low, high in line.band] for end in (0, 1))
        edge = [point for point in (*lows, *reversed(highs)) if point is not None]
        if len(edge) > 2:
            pen.polygon(edge, fill=(*_rgb(colour), 44))
        hollow = _is_hollow(names, line.name)
        for piece in _pieces([place(x, y) for x, y in line.points]):
            pen.line(piece, colour, width=1 if hollow else 2)
            for x, y in piece:
                if hollow:
                    pen.ellipse((x - 3, y - 3, x + 3, y + 3), PAPER, colour)
                else:
                    pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)


def _swatch(pen: ImageDraw.ImageDraw, box: tuple[float, float, float, float], names: list[str], name: str) -> None:
    """A name's mark in the legend."""
    colour = _colour(names, name)
    pen.rectangle(box, PAPER if _is_hollow(names, name) else colour, colour, width=2)


def _pieces(points: Sequence[Point | None]) -> list[list[Point]]:
    """Runs of points that can be shown: nothing is drawn across a gap."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if point is not None:
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _heat(pen: ImageDraw.ImageDraw, heat: Heat, top: int) -> None:
    pen.text((20, top + 4), heat.title, INK, _font(14))
    shares = heat.shares()
    top += 2 * LEGEND_ROW
    for column, name in enumerate(heat.columns):
        pen.text((LABELS + CELL * (column + 0.5), top - 4), _cut(name, CELL), INK, _font(10), anchor="ms")
    for row, (name, values) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = top + CELL / 2 * row
        pen.text((LABELS - 8, y + CELL / 4), _cut(name, LABELS - 20), INK, _font(11), anchor="rm")
        for column, value in enumerate(values):
            x = LABELS + CELL * column
            pen.rectangle((x, y, x + CELL - 1, y + CELL / 2 - 1), _shade(shares[row][column]))
            pen.text((x + CELL / 2, y + CELL / 4), _number(value), INK, _font(10), anchor="mm")


def _heat_height(heat: Heat) -> int:
    return 3 * LEGEND_ROW + CELL // 2 * len(heat.rows)


def _shade(share: float) -> str:
    """White at 0 and where there is no value, red above it, blue below."""
    if not math.isfinite(share):
        return PAPER
    fade = round(255 * (1 - 0.75 * min(1.0, abs(share))))
    return f"#ff{fade:02x}{fade:02x}" if share > 0 else f"#{fade:02x}{fade:02x}ff"


def _legend_places(names: Sequence[str], width: int) -> list[tuple[float, int]]:
    """(x, row) of each name: as many in a row as fit."""
    places, x, row = [], 20.0, 0
    for name in names:
        needed = 40 + _font(12).getlength(name)
        if x + needed > width and x > 20:
            x, row = 20.0, row + 1
        places.append((x, row))
        x += needed
    return places


def _cut(name: str, width: float) -> str:
    while name and _font(10).getlength(name) > width:
        name = name[:-1]
    return name


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * round_ for round_ in (1, 2, 5, 10) if power * round_ >= raw)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for rounds in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [r * 10.0**decade for decade in decades for r in rounds if low <= r * 10.0**decade <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / (2 * MOST_TICKS))]
    return [low, high]


def _can_show(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value / 1e6:.3g} M" if abs(value) >= 1e6 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _colour(names: list[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _is_hollow(names: list[str], name: str) -> bool:
    return names.index(name) >= len(COLOURS)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _save(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_whole(path, buffer.getvalue())
