"""Judges results anew from the curves that they hold, after the statistics have changed; nothing is trained or scored.

    python -m benchmarks.convergence_again benchmarks/results/cpu/convergence-digits-smoke-seeds.json ...

Thresholds, speed-ups and verdicts are made again; curves, noise, hours and the environment stay as they were measured.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence_presets import Preset
from benchmarks.convergence_statistics import Curve, Point
from benchmarks.convergence_summary import BEST, FIXED, analysis
from benchmarks.convergence_tables import draw
from benchmarks.tables import read
from benchmarks.whole_file import write_json
from fasttrain.errors import UserError


def judged_again(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with all that follows from its curves made again. Hours and grids that it does not hold are told as not kept.

    Raises:
        UserError: it does not tell which runs diverged.
    """
    preset = Preset.model_validate(result["preset"])
    groups = {}
    for name, group in result["groups"].items():
        found = {choice: {arm: _curves(arm, values) for arm, values in group[choice]["arms"].items()} for choice in (BEST, FIXED)}
        anew = {
            choice: {**group[choice], **analysis(preset, preset.groups[name], curves, result["batch"])} for choice, curves in found.items()
        }
        groups[name] = {"hours": None, "grids": None, "with_more_steps": None, **group, **anew}
    return {**result, "groups": groups}


def _curves(arm: str, values: Mapping[str, Any]) -> list[Curve]:
    number, runs = values["diverged"], len(values["curves"])
    which = values.get("which_diverged", [number > 0] * runs if number in (0, runs) else None)
    if which is None:
        raise UserError(f"this result tells that {number} of {runs} runs of {arm} diverged, and not which: run its comparison again")
    return [
        Curve(tuple(Point(images, float("inf") if score is None else score) for images, score in points), gone)
        for points, gone in zip(values["curves"], which, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes each result and its picture anew. Returns 0, or a mistake's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of benchmarks.convergence")
    try:
        for path in parser.parse_args(arguments).results:
            if (result := read(path)) is None:
                raise UserError(f"no result {path}")
            anew = judged_again(result)
            write_json(path, anew)
            draw(path.with_suffix(".png"), anew)
    except UserError as error:
        print(f"convergence_again: {error}")
        return error.status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
