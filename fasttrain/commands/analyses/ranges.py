"""`fasttrain analyse ranges RUN [RUN ...]`: the unweighted loss of each timestep range over training, of several runs beside each other."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttrain.charts import Line, Panel, line_chart
from fasttrain.commands.analyses.output import add_output_argument, folder_of, write
from fasttrain.diffusion.prediction import PREDICTIONS
from fasttrain.diffusion.weighting import WEIGHTINGS
from fasttrain.errors import UserError
from fasttrain.lines import records
from fasttrain.research.ranges import Curve, averaged
from fasttrain.run import read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="+", help="run folders; all with one prediction, schedule and log.timestep_ranges")
    parser.add_argument("--show", nargs="+", metavar="FIRST-LAST", help="only these ranges, as in `0-99 200-299` (default: all)")
    parser.add_argument("--average", type=int, default=1, help="reports that are averaged to a point (default 1)")
    parser.add_argument("--log-x", action="store_true", help="a logarithmic axis of images")
    add_output_argument(parser)


def run(args: argparse.Namespace) -> None:
    if args.average < 1:
        raise UserError(f"--average must be positive, got {args.average}")
    target, schedule, names = _common(args.run)
    shown = names if args.show is None else args.show
    if strangers := [name for name in shown if name not in names]:
        raise UserError(f"--show {strangers[0]}: the runs' ranges are {', '.join(names)}")
    curves = {name: _curves(folder, shown, args.average) for name, folder in zip(labels(args.run), args.run, strict=True)}
    result = {
        "loss": f"mean squared error of {target['name']}, unweighted",
        "prediction": target,
        "schedule": schedule,
        "averaged_reports": args.average,
        "runs": {run: _described(folder, curves[run]) for run, folder in zip(curves, args.run, strict=True)},
    }
    for name in shown:
        last = ", ".join(f"{run} {of[name].points[-1][1]:.4g}" for run, of in curves.items() if of[name].points)
        print(f"timesteps {name:>9}, at the end: {last}")
    write(folder_of(args, args.run[0]), "ranges", result, lambda path: _draw(path, curves, shown, args.log_x))


def labels(runs: Sequence[Path]) -> list[str]:
    """A name for each run: as few of its path's last parts as tell all of them apart."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    raise UserError("the same run is given twice: give each once")


def _common(runs: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What the runs share: the target, the schedule and the names of the ranges.

    Raises:
        UserError: they do not, so that their losses mean different things.
    """
    found = []
    for folder in runs:
        config, _ = read_run(folder)
        diffusion = config.plain()["diffusion"]
        names = next((list(record["mse_by_timestep"]) for record in records(folder / "metrics.jsonl") if "mse_by_timestep" in record), None)
        if names is None:
            raise UserError(f"{folder} has reported no losses yet: let it train to its first report (log.every)")
        found.append((PREDICTIONS.spec(config.diffusion.prediction), diffusion["schedule"], names))
    for folder, own in zip(runs, found, strict=True):
        for what, mine, first in zip(("diffusion.prediction", "diffusion.schedule", "log.timestep_ranges"), own, found[0], strict=True):
            if mine != first:
                raise UserError(f"{what} of {folder} is not that of {runs[0]}: their losses by range cannot be compared")
    return found[0]


def _curves(folder: Path, names: Sequence[str], average: int) -> dict[str, Curve]:
    reports = [record for record in records(folder / "metrics.jsonl") if "mse_by_timestep" in record]
    curves = {}
    for name in names:
        points = [(record["position"], record["mse_by_timestep"].get(name)) for record in reports]
        curves[name] = averaged([(x, y) for x, y in points if y is not None and math.isfinite(y)], average)
    return curves


def _described(folder: Path, curves: dict[str, Curve]) -> dict[str, Any]:
    config, _ = read_run(folder)
    return {
        "weighting": WEIGHTINGS.spec(config.diffusion.weighting),
        "seed": config.seed,
        "global_batch": config.training.global_batch,
        "curves": {name: {"images": [x for x, _ in curve.points], "mse": [y for _, y in curve.points]} for name, curve in curves.items()},
    }


def _draw(path: Path, curves: dict[str, dict[str, Curve]], names: Sequence[str], log_x: bool) -> None:
    panels = [
        Panel(f"timesteps {name}", [Line(run, of[name].points) for run, of in curves.items()], "images", "mse", log_x=log_x, log_y=True)
        for name in names
    ]
    line_chart(path, "Unweighted loss by timestep range", panels)
