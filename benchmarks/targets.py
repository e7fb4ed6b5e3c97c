"""The project's targets on a GPU, line by line, beside what was measured there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables

Result = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One line.

    Args:
        what: in words.
        target, stretch: the least that reaches it.
        unit: "x", "img/s" or "of copy".
        measured: from (kernels result, step result) to the figure, or None where it was not measured.
    """

    what: str
    target: float
    stretch: float | None
    unit: str
    measured: Callable[[Result, Result], float | None]


def _of_copy(operation: str, direction: str) -> Callable[[Result, Result], float | None]:
    """Share of the copy bandwidth at D = 1152, at the larger batch."""

    def measured(kernels: Result, step: Result) -> float | None:
        cases = [
            c for c in kernels.get("cases", ()) if c["case"]["operation"] == operation and direction in c.get("arms", {}).get("ours", {})
        ]
        wide = [c for c in cases if operation == "adamw_ema" or c["case"]["sample"] == [256, 1152]]
        return max(wide, key=lambda c: c["case"]["batch"])["arms"]["ours"][direction]["of_copy"] if wide else None

    return measured


def _update_ratio(kernels: Result, step: Result) -> float | None:
    cases = [c for c in kernels.get("cases", ()) if "update_fused_foreach_over_ours" in c]
    return min((c["update_fused_foreach_over_ours"]["median"] for c in cases), default=None)


def _race(model: str, figure: Callable[[Result], float | None]) -> Callable[[Result, Result], float | None]:
    """A figure of the model's first race."""

    def measured(kernels: Result, step: Result) -> float | None:
        races = [c for c in step.get("cases", ()) if c["case"].get("part") == "arms" and c["case"].get("model") == model and "arms" in c]
        return figure(races[0]) if races else None

    return measured


def _over(*arms: str) -> Callable[[Result], float | None]:
    """How much faster our best arm is than the best of these."""

    def figure(race: Result) -> float | None:
        ratios = [race.get("over_ours", {})[arm]["median"] for arm in arms if arm in race.get("over_ours", {})]
        return min(ratios, default=None)

    return figure


def _rate(race: Result) -> float | None:
    best = race.get("best_of_ours")
    return race["arms"][best]["images_per_second"] if best else None


COMPILED = ("compile", "compile + graphs")
TARGETS = (
    Target("DiT-XL/2 training, with optimizer and EMA (the target is an H200's)", 650, 777, "img/s", _race("dit-xl/2", _rate)),
    Target("DiT-XL/2 against tuned torch.compile", 1.10, 1.25, "x", _race("dit-xl/2", _over(*COMPILED))),
    Target("ViT-XL/2 against tuned torch.compile", 1.05, 1.15, "x", _race("vit-xl/2", _over(*COMPILED))),
    Target("DiT-XL/2 against eager autocast", 1.6, 2.0, "x", _race("dit-xl/2", _over("eager"))),
    Target("AdaLN forward, D = 1152, cold L2", 0.86, 0.90, "of copy", _of_copy("adaln", "forward")),
    Target("AdaLN backward", 0.77, 0.85, "of copy", _of_copy("adaln", "backward")),
    Target("gated AdaLN forward, D = 1152, cold L2", 0.86, 0.90, "of copy", _of_copy("gated_adaln", "forward")),
    Target("gated AdaLN backward", 0.77, 0.85, "of copy", _of_copy("gated_adaln", "backward")),
    Target("AdamW and EMA in one pass", 0.85, 0.92, "of copy", _of_copy("adamw_ema", "update")),
    Target("AdamW and EMA against fused AdamW and foreach EMA", 1.4, None, "x", _update_ratio),
)


def table(results: Path) -> str:
    """Every target beside what each GPU gave."""
    folders = [folder for folder in sorted(results.iterdir()) if folder.is_dir() and folder.name != "cpu"]
    found = {folder.name: [tables.read(folder / f"{name}.json") or {} for name in ("kernels", "step")] for folder in folders}
    found = {name: pair for name, pair in found.items() if any(pair)}
    if not found:
        return tables.NOT_MEASURED
    rows = []
    for target in TARGETS:
        measured = [_told(target, target.measured(*pair)) for pair in found.values()]
        rows.append([target.what, shown(target, target.target), shown(target, target.stretch) if target.stretch else "", *measured])
    return "\n".join(tables.table(["what", "target", "stretch", *found], rows))


def shown(target: Target, value: float) -> str:
    """A figure with its unit."""
    return {"img/s": f"{value:.0f} img/s", "x": f"{value:.2f}x", "of copy": f"{100 * value:.0f} % of copy"}[target.unit]


def _told(target: Target, value: float | None) -> str:
    if value is None:
        return "not measured"
    reached = "stretch reached" if target.stretch and value >= target.stretch else "reached" if value >= target.target else "missed"
    return f"{shown(target, value)}, {reached}"
