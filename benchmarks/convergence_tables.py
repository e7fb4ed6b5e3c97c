"""Tables and curves of a comparison, from its JSON."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence_presets import MORE_STEPS
from benchmarks.tables import read, table
from fasttrain.charts import Line, Panel, line_chart

Result = dict[str, Any]
Rows = tuple[list[str], list[list[str]]]
NOT_RUN = "*Not run.*"


def convergence(name: str, results: Path) -> str:
    """A comparison's tables, wherever its result is committed."""
    found = {path.parent.name: result for path in sorted(results.glob(f"*/convergence-{name}.json")) if (result := read(path))}
    parts = []
    for device, result in found.items():
        about = [told(device, result), "", *table(*speed_up_rows(result))]
        picture = results / device / f"convergence-{name}.png"
        if picture.exists():
            about += ["", f"![{name}: score by images]({picture.relative_to(results.parent.parent).as_posix()})"]
        parts.append("\n".join(about))
    return "\n\n".join(parts) if parts else NOT_RUN


def told(device: str, result: Result) -> str:
    """What was compared, in one line."""
    score, noise = result["preset"]["score"], result["noise"]
    seeds = min(len(group["seeds"]) for group in result["groups"].values())
    floor = f"; noise of a score between seeds of the samples {noise['relative_deviation']:.1%}" if noise else ""
    return (
        f"{result['preset']['about']} ({device}; {seeds} seeds, Frechet distance in {score['features']}, {score['count']:,} samples, "
        f"{' '.join(score['sampler'])} of {score['steps']} steps{floor}{more_steps_words(result)}{grid_words(result)}):"
    )


def more_steps_words(result: Result) -> str:
    """How far last scores move where the sampler takes more steps: what is within that is the sampler's doing."""
    found = {f"{name} {arm}": by for name, group in result["groups"].items() for arm, by in (group["with_more_steps"] or {}).items() if by}
    if not found:
        return ""
    least, most = (choice(found, key=lambda arm: found[arm]) for choice in (min, max))
    span = f"{found[least]:.2f} ({least}) to {found[most]:.2f} ({most})"
    return f"; with {MORE_STEPS} times the sampler's steps last scores are {span} of these"


def grid_words(result: Result) -> str:
    """Where arms were sampled on grids with other ends: which, since their scores then differ by the sampler too."""
    by_ends: dict[str, list[str]] = {}
    for name, group in result["groups"].items():
        for arm, ends in (group["grids"] or {}).items():
            by_ends.setdefault(f"{ends['largest_sigma']:.3g} to {ends['smallest_sigma']:.2g}", []).append(f"{name} {arm}")
    if len(by_ends) < 2:
        return ""
    usual, *others = sorted(by_ends, key=lambda ends: -len(by_ends[ends]))
    apart = ", ".join(f"{ends} for {' and '.join(by_ends[ends])}" for ends in others)
    return f"; the sampler's noise levels end with the schedule: {usual}, but {apart}"


def speed_up_rows(result: Result, choice: str = "best") -> Rows:
    """A row an arm: its last score, its hours, and how many times fewer images than its group's baseline each threshold took it."""
    most = max((len(group[choice]["thresholds"]) for group in result["groups"].values()), default=0)
    rows = []
    for name, group in result["groups"].items():
        found = group[choice]
        for arm, values in found["arms"].items():
            ups = [""] * most if arm == group["baseline"] else [speed_up_words(up) for up in values["speed_up"]]
            needed = [images_words(spans) for spans in values["images_to"]] if arm == group["baseline"] else []
            cells = needed or ups
            rows.append([f"{name} {arm}", final_words(values), hours_words(group, arm), *cells, *[""] * (most - len(cells))])
    head = [f"threshold {number}" for number in range(1, most + 1)]
    return ["arm", "last score", "hours", *head], [*threshold_rows(result, choice, most), *rows]


def threshold_rows(result: Result, choice: str, most: int) -> list[list[str]]:
    """The thresholds of each group, as rows of the same table."""
    rows = []
    for name, group in result["groups"].items():
        values = [f"{value:.3g}" for value in group[choice]["thresholds"]]
        rows.append([f"{name}: distance to reach", "", "", *values, *[""] * (most - len(values))])
    return rows


def final_words(arm: Mapping[str, Any]) -> str:
    """The mean of the last scores of what did not diverge."""
    runs, final = len(arm["curves"]), arm["final"]
    gone = f"{arm['diverged']} of {runs} diverged or learned nothing" if arm["diverged"] else ""
    if final is None:
        return gone
    return ", ".join(part for part in (with_interval(final["mean"], final["interval"], "{:.3g}"), gone) if part)


def hours_words(group: Mapping[str, Any], arm: str) -> str:
    """What the arm's trainings and scores took, all seeds together: on the clock, and of GPUs where there were any."""
    if group["hours"] is None:
        return "not kept"
    hours = group["hours"][arm]
    gpus = f", {hours['gpu_hours']:.2f} GPU" if hours["gpu_hours"] else ""
    return f"{hours['run_hours']:.2f}{gpus}"


def speed_up_words(up: Mapping[str, Any]) -> str:
    """A speed-up, a bound, or divergence."""
    gone = f"{up['diverged']} lost" if up["diverged"] else ""
    if up["value"] is not None:
        known = with_interval(up["value"], up["interval"], "{:.2f}") + " x"
    else:
        bounds = {"more than": up["at_least"], "less than": up["at_most"]}
        known = ", ".join(f"{words} {value:.2f} x" for words, value in bounds.items() if value is not None) or ("" if gone else "not known")
    bounds = f"{up['bounds']} of {up['pairs']} pairs are bounds" if up["bounds"] else ""
    return ", ".join(part for part in (known, bounds, gone) if part)


def images_words(spans: Sequence[Sequence[float | None] | None]) -> str:
    """The baseline's images: their geometric mean, where every run got there and is known."""
    known = [span for span in spans if span is not None]
    if known and all(low == high for low, high in known):
        return f"{statistics.geometric_mean([low for low, _ in known if low]):,.0f} images"
    lows, highs = [low or 0.0 for low, _ in known], [high for _, high in known]
    if any(high is None for high in highs):
        return f"more than {max(lows):,.0f} images" if known else "diverged"
    return f"at most {max(high for high in highs if high):,.0f} images"


def with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    """2.04 (1.80 to 2.31)."""
    shown = form.format(value)
    return shown if interval is None else f"{shown} ({form.format(interval[0])} to {form.format(interval[1])})"


def draw(path: Path, result: Result, choice: str = "best") -> None:
    """A panel a group: the geometric mean over the seeds, and the band from the lowest to the highest."""
    panels = [
        Panel(
            name, [_line(arm, values["curves"]) for arm, values in group[choice]["arms"].items()], "images", "Frechet distance", True, True
        )
        for name, group in result["groups"].items()
    ]
    line_chart(path, result["preset"]["about"], panels)


def _line(name: str, curves: Sequence[Sequence[Sequence[float | None]]]) -> Line:
    """Only points that every run has: a mean of those that are left would jump where one is lost."""
    by_images: dict[float, list[float]] = {}
    for curve in curves:
        for images, score in curve:
            if images is not None and score is not None:
                by_images.setdefault(images, []).append(score)
    whole = {images: scores for images, scores in sorted(by_images.items()) if len(scores) == len(curves) and min(scores) > 0}
    points = [(images, statistics.geometric_mean(scores)) for images, scores in whole.items()]
    return Line(name, points, [(images, min(scores), max(scores)) for images, scores in whole.items()])
