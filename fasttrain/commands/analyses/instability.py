"""`fasttrain analyse instability RUN`: how UGD's weights vary with the samples behind them, and what they cost."""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fasttrain.charts import Line, Panel, line_chart
from fasttrain.commands.analyses.measuring import (
    TIMEOUT_SECONDS,
    Subject,
    add_gradient_arguments,
    add_measuring_arguments,
    draws_of,
    measure_gradients,
    subject,
)
from fasttrain.commands.analyses.output import folder_of, write
from fasttrain.commands.analyses.pareto import add_solver_arguments, solver_of
from fasttrain.engine import distributed
from fasttrain.errors import UserError
from fasttrain.range_losses import Draws
from fasttrain.research.pareto import normalised, regularised
from fasttrain.research.ugd import Ugd

TIMED = 3  # plain passes, of which the median counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_arguments(parser)
    add_gradient_arguments(parser)
    add_solver_arguments(parser)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 32, 128, 512], help="samples a range (default 8 32 128 512)")
    parser.add_argument("--repeats", type=int, default=5, help="estimates of each, from samples of their own (default 5)")
    parser.add_argument("--lambda", dest="regularisation", type=float, default=0.1, help="of equation 11, as in `pareto` (default 0.1)")


def run(args: argparse.Namespace) -> None:
    solver = solver_of(args)
    if args.repeats < 2 or min(args.counts) < 2:
        raise UserError("--repeats and --counts: the spread needs 2 repeats or more, and each at least 2 samples")
    if not 0 <= args.regularisation < float("inf"):
        raise UserError(f"--lambda must not be negative, got {args.regularisation}")
    with distributed.joined(TIMEOUT_SECONDS) as processes, subject(args, processes, args.checkpoint_step) as on:
        plain = _plain_seconds(on, args.batch)
        rows, first = [], 0
        for count in sorted(set(args.counts)):
            row, first = _row(on, args, solver, count, first)
            rows.append({**row, "times_a_plain_step": (plain + row["seconds"]) / plain})
            if processes.is_main:
                _tell(rows[-1])
        if processes.is_main:
            result = _result(on, args, solver, plain, rows)
            write(folder_of(args, args.run), "instability", result, lambda path: _draw(path, result))


def spread(weights: torch.Tensor) -> float:
    """How far repeated solutions [R, K] lie apart: the mean over pairs of half the summed difference, 0 (equal) to 1 (disjoint)."""
    apart = (weights[:, None] - weights[None]).abs().sum(-1) / 2
    return float(apart.sum() / (len(weights) * (len(weights) - 1)))


def _row(on: Subject, args: argparse.Namespace, solver: Ugd, count: int, first: int) -> tuple[dict[str, Any], int]:
    """What repeated estimates from `count` samples a range give, and the position after the last one."""
    solved, seconds, noise = [], [], []
    for _ in range(args.repeats):
        draws = draws_of(args, count, first)
        first = draws.after
        begin = time.perf_counter()
        found = measure_gradients(on, draws, args.memory)
        solved.append(solver.solve(regularised(normalised(found.gram), args.regularisation)).weights)
        seconds.append(time.perf_counter() - begin)
        noise.append(found.noise_shares.tolist())
    weights = torch.stack(solved)
    row = {
        "samples_per_range": count,
        "weights": weights.tolist(),
        "mean": weights.mean(0).tolist(),
        "deviation": weights.std(0).tolist(),
        "spread": spread(weights),
        "noise_shares": torch.tensor(noise).mean(0).tolist(),
        "seconds": statistics.median(seconds),
    }
    return row, first


def _plain_seconds(on: Subject, batch: int) -> float:
    """Seconds of one forward and backward pass over a training step's images, as Min-SNR's step takes; its update is left out."""
    network, images = on.trained.network, on.trained.config.training.global_batch
    mine = max(1, images // on.processes.world_size)
    draws = Draws(1, mine * on.processes.world_size, batch)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    taken = []
    for _ in range(1 + TIMED):  # the first warms up
        begin = time.perf_counter()
        for loss in on.losses.batches(network, draws, 0, 0):
            gradients = torch.autograd.grad(loss.loss, parameters, allow_unused=True)
        float(sum(g.sum() for g in gradients if g is not None))  # waits for the device
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def _result(on: Subject, args: argparse.Namespace, solver: Ugd, plain: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    told = {key: value for key, value in on.told(args).items() if key != "samples_per_range"}
    return {
        **told,
        "lambda": args.regularisation,
        "ugd": {"steps": solver.steps, "rate": solver.rate},
        "repeats": args.repeats,
        "global_batch": on.trained.config.training.global_batch,
        "plain_step_seconds": plain,
        "plain_step": "forward and backward over global_batch images, without the update",
        "counts": rows,
    }


def _tell(row: dict[str, Any]) -> None:
    print(
        f"{row['samples_per_range']:>6} samples a range: weights {row['spread']:.3f} apart, "
        f"{row['seconds']:.2f} s: a step takes {row['times_a_plain_step']:.1f} times a plain one's time"
    )


def _draw(path: Path, result: dict[str, Any]) -> None:
    rows, count = result["counts"], result["ranges"]

    def per_range(row: dict[str, Any]) -> Line:
        middles = [(k + 0.5) / count for k in range(count)]
        ends = [(x, mean - dev, mean + dev) for x, mean, dev in zip(middles, row["mean"], row["deviation"], strict=True)]
        return Line(f"{row['samples_per_range']} samples", list(zip(middles, row["mean"], strict=True)), ends)

    apart = Line("spread", [(row["samples_per_range"], row["spread"]) for row in rows])
    cost = Line("cost", [(row["samples_per_range"], row["times_a_plain_step"]) for row in rows])
    title = f"UGD's weights, mean and deviation of {result['repeats']} estimates"
    panels = [
        *(Panel(title, [per_range(row)], "t / T", "weight") for row in (rows[0], rows[-1])),
        Panel("how far repeated solutions lie apart", [apart], "samples a range", "0: equal, 1: disjoint", log_x=True),
        Panel("cost of a step with UGD", [cost], "samples a range", "times a plain step", log_x=True, log_y=True),
    ]
    line_chart(path, f"{result['run']}, step {result['checkpoint_step']}: are UGD's weights stable?", panels)
