"""`fasttrain analyse finetune RUN`: trains on one range of timesteps at a time, and looks at what that does to all ranges."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from fasttrain.charts import Heat, Line, Panel, heat_chart, line_chart
from fasttrain.commands.analyses.measuring import TIMEOUT_SECONDS, Subject, add_measuring_arguments, draws_of, subject
from fasttrain.commands.analyses.output import folder_of, write
from fasttrain.commands.generating import refuse_untrained
from fasttrain.config import RunConfig
from fasttrain.engine import distributed
from fasttrain.errors import UserError
from fasttrain.files import write_whole
from fasttrain.research.ranges import change, told_apart
from fasttrain.trained import RAW, Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_arguments(parser, samples=1024)
    parser.add_argument("--on", type=int, nargs="+", metavar="K", help="ranges to train on, counted from 0 (default: 1 2 3, the paper's)")
    parser.add_argument("--steps", type=int, default=200, help="of each fine-tuning (default 200)")
    parser.add_argument("--learning-rate", type=float, help="constant (default: a tenth of the run's own)")


def run(args: argparse.Namespace) -> None:
    chosen = sorted(set(args.on if args.on is not None else [k for k in (1, 2, 3) if k < args.ranges]))
    if not all(0 <= k < args.ranges for k in chosen):
        raise UserError(f"--on: ranges are 0 to {args.ranges - 1}, got {chosen}")
    if args.steps < 1 or not (args.learning_rate is None or 0 < args.learning_rate < float("inf")):
        raise UserError(f"--steps and --learning-rate must be positive, got {args.steps} and {args.learning_rate}")
    refuse_untrained([args.weights], "fine-tuning begins from weights that were trained: give ema or raw")
    with distributed.joined(TIMEOUT_SECONDS) as processes, subject(args, processes) as on:
        if processes.world_size > 1:
            raise UserError("analyse finetune starts trainings of its own: run it as one process")
        draws, rate = draws_of(args), args.learning_rate or on.trained.config.optimizer.learning_rate / 10
        before = on.losses.means(on.trained.network, draws)
        rows = []
        for number in chosen:
            tuned = fine_tuned(on, args, number, rate)
            rows.append(_row(number, before, on.losses.means(tuned.network, draws)))
        result = {**on.told(args), "steps": args.steps, "learning_rate": rate, "loss_before": before.mean(1).tolist(), "tuned": rows}
        _tell(result)
        folder = folder_of(args, args.run)
        write(folder, "finetune", result, lambda path: _draw(path, result))


def fine_tuned(on: Subject, args: argparse.Namespace, number: int, rate: float) -> Trained:
    """Trains a run on one range by the real `fasttrain train`, in a process of its own: an engine lives as long as its process.

    Raises:
        UserError: the training fails; it has told why.
    """
    folder = (
        folder_of(args, args.run) / "finetune" / f"range-{number}-of-{args.ranges}-{args.weights}-{on.trained.step}-{args.steps}-{rate:g}"
    )
    path, log = (folder.with_name(f"{folder.name}.{ending}") for ending in ("yaml", "log"))  # the name ends with a rate, which has a point
    write_whole(path, yaml.safe_dump(plan(on.trained.config, args, number, rate, folder), sort_keys=False))
    print(f"training on range {number}: {folder}", flush=True)
    with log.open("wb") as told:
        done = subprocess.run([sys.executable, "-m", "fasttrain", "train", str(path)], stdout=told, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise UserError(f"fine-tuning on range {number} ended with status {done.returncode}: see {log}; run the same command to go on")
    return Trained.load(folder, RAW, on.processes.device)


def plan(config: RunConfig, args: argparse.Namespace, number: int, rate: float, folder: Path) -> dict[str, Any]:
    """The config of a fine-tuning: the run's own but for where it begins, what it is trained on, how fast and how long."""
    raw = config.plain()
    raw |= {"run_dir": str(folder), "init_from": {"source": str(args.run), "weights": args.weights}}
    raw["diffusion"] |= {"timesteps": {"name": "window", "low": number / args.ranges, "high": (number + 1) / args.ranges}}
    raw["optimizer"] |= {"learning_rate": rate, "warmup_steps": 0, "decay": "constant", "momentum_decay": None}
    raw["training"] |= {"steps": args.steps}
    raw["checkpoint"] |= {"every": args.steps, "keep_every": None}
    raw["sampling"] |= {"every": None}
    raw["log"] |= {"every": min(raw["log"]["every"], args.steps), "held_out_every": None, "tensorboard": False}
    return raw


def _row(number: int, before: Tensor, after: Tensor) -> dict[str, Any]:
    found = change(before, after)
    return {
        "range": number,
        "loss_after": after.mean(1).tolist(),
        "change": found.share.tolist(),
        "standard_error": found.error.tolist(),
        "better_or_worse": told_apart(found).int().tolist(),
    }


def _tell(result: dict[str, Any]) -> None:
    names = result["names"]
    print("change of each range's x0 loss in %, by what was trained on (*: beyond two standard errors)")
    print(" " * 12 + "".join(f"{name:>10}" for name in names))
    for row in result["tuned"]:
        cells = zip(row["change"], row["better_or_worse"], strict=True)
        print(f"{names[row['range']]:>12}" + "".join(f"{100 * share:>+9.2f}{'*' if apart else ' '}" for share, apart in cells))


def _draw(path: Path, result: dict[str, Any]) -> None:
    names, rows = result["names"], result["tuned"]
    middles = [(k + 0.5) / len(names) for k in range(len(names))]
    lines = []
    for row in rows:
        ends = [(x, 100 * (y - 2 * e), 100 * (y + 2 * e)) for x, y, e in zip(middles, row["change"], row["standard_error"], strict=True)]
        points = [(x, 100 * y) for x, y in zip(middles, row["change"], strict=True)]
        lines.append(Line(f"trained on {names[row['range']]}", points, ends))
    title = f"{result['run']}, {result['weights']} weights: {result['steps']} steps on one range"
    panel = Panel("change of the x0 loss, and two standard errors (below 0: better)", lines, "t / T", "%")
    line_chart(path, title, [panel])
    heat = Heat(
        "change of the x0 loss in %", [[100 * c for c in row["change"]] for row in rows], [names[row["range"]] for row in rows], names
    )
    heat_chart(path.with_name(f"{path.stem}-matrix.png"), title, [heat])
