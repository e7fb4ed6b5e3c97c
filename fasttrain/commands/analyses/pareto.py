"""`fasttrain analyse pareto RUN`: the Pareto objective of every weighting, against those of UGD and of the optimum.

A network that was trained with a weighting comes to where that weighting's own sum of gradients is small: its objective on its own runs is
low by that alone. So compare weightings on runs of each, and on untrained weights.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.charts import Line, Panel, line_chart
from fasttrain.commands.analyses.gradients import described
from fasttrain.commands.analyses.measuring import (
    TIMEOUT_SECONDS,
    add_gradient_arguments,
    add_measuring_arguments,
    draws_of,
    measure_gradients,
    subject,
)
from fasttrain.commands.analyses.output import folder_of, write
from fasttrain.config import RunConfig
from fasttrain.diffusion.timestep_weights import Pareto, placed
from fasttrain.diffusion.weighting import WEIGHTINGS, Weighting
from fasttrain.engine import distributed
from fasttrain.errors import UserError
from fasttrain.range_losses import range_names
from fasttrain.research.frank_wolfe import least_norm
from fasttrain.research.pareto import compare, normalised, range_weights, regularised
from fasttrain.research.ugd import Ugd
from fasttrain.run import read_run

OPTIMUM, UGD = "optimum (frank_wolfe)", "ugd"
THE_RUNS_OWN = "the run's own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_arguments(parser)
    add_gradient_arguments(parser)
    parser.add_argument("--gradients", type=Path, metavar="FILE", help="a gradients.json of this run, instead of measuring them anew")
    parser.add_argument(
        "--lambda",
        dest="regularisations",
        type=float,
        nargs="+",
        default=[0.0, 0.01, 0.03, 0.1, 0.3, 1.0],
        help="of equation 11, in units of the mean squared gradient (default 0 0.01 0.03 0.1 0.3 1)",
    )
    add_solver_arguments(parser)


def add_solver_arguments(parser: argparse.ArgumentParser) -> None:
    """How UGD descends."""
    parser.add_argument("--ugd-steps", type=int, default=Ugd.steps, help=f"steps of UGD (default {Ugd.steps}, the paper's)")
    parser.add_argument("--ugd-rate", type=float, default=Ugd.rate, help=f"their length (default {Ugd.rate:g})")


def solver_of(args: argparse.Namespace) -> Ugd:
    """The UGD that is asked for. Raises UserError for numbers that cannot be."""
    try:
        return Ugd(args.ugd_steps, args.ugd_rate)
    except ValueError as error:
        raise UserError(f"--ugd-steps, --ugd-rate: {error}") from None


def run(args: argparse.Namespace) -> None:
    solver = solver_of(args)
    if any(not 0 <= given < float("inf") for given in args.regularisations):
        raise UserError(f"--lambda must not be negative, got {args.regularisations}")
    if args.gradients is not None:
        config, _ = read_run(args.run)
        _report(args, config, solver, _read(args.gradients, config))
        return
    with distributed.joined(TIMEOUT_SECONDS) as processes, subject(args, processes, args.checkpoint_step) as on:
        found = measure_gradients(on, draws_of(args), args.memory)
        if processes.is_main:
            _report(args, on.trained.config, solver, {**on.told(args), **described(found)})


def weightings_of(config: RunConfig) -> dict[str, Weighting]:
    """Every registered weighting with its own defaults, and the run's; those that only stand in for others are left out."""
    schedule = config.diffusion.schedule
    named = {name: WEIGHTINGS.build(name) for name in WEIGHTINGS.names() if name not in ("table", "pareto")}
    if config.diffusion.weighting not in named.values() and not isinstance(config.diffusion.weighting, Pareto):
        named[THE_RUNS_OWN] = config.diffusion.weighting
    return {name: placed(weighting, schedule) for name, weighting in named.items()}


def _report(args: argparse.Namespace, config: RunConfig, solver: Ugd, gradients: dict[str, Any]) -> None:
    measured = torch.tensor(gradients["gram"], dtype=torch.float64)
    if not measured.diagonal().sum() > 0:
        raise UserError(
            f"all gradients of {args.run} are 0 there, so no weighting is nearer to Pareto's optimum: choose another checkpoint"
        )
    gram = normalised(measured)
    noise = gram.diagonal() * torch.tensor(gradients["noise_shares"], dtype=torch.float64)
    shares = _shares(config, len(gram))
    by_lambda = [_solved(gram, noise, shares, solver, given) for given in sorted(set(args.regularisations))]
    result = {
        **gradients,
        "unit_of_lambda": "the mean squared length of the ranges' gradients",
        "normalisation": "weights divided by their sum",
        "without_noise": "the objective, |g_k|^2 taken between two halves of the samples",
        "ugd": {"steps": solver.steps, "rate": solver.rate},
        "range_weights": {name: share.tolist() for name, share in shares.items()},
        "by_lambda": by_lambda,
    }
    for row in by_lambda:
        _tell(row)
    write(folder_of(args, args.run), "pareto", result, lambda path: _draw(path, result))


def _shares(config: RunConfig, ranges: int) -> dict[str, Tensor]:
    found = {name: range_weights(w, config.diffusion.schedule, ranges) for name, w in weightings_of(config).items()}
    for name in [name for name, share in found.items() if not share.isfinite().all()]:
        print(f"weighting {name} is left out: it has no finite sum under this schedule")
        del found[name]
    return found


def _solved(gram: Tensor, noise: Tensor, shares: dict[str, Tensor], solver: Ugd, regularisation: float) -> dict[str, Any]:
    matrix = regularised(gram, regularisation)
    best, descended = least_norm(matrix), solver.solve(matrix)
    solved = {OPTIMUM: best.weights, UGD: descended.weights}
    return {
        "lambda": regularisation,
        "optimum": {"weights": best.weights.tolist(), "gap": best.gap, "iterations": best.iterations},
        "ugd": {"weights": descended.weights.tolist(), "gap": descended.gap},
        "weightings": compare(gram, noise, {**solved, **shares}, best.weights, regularisation),
    }


def _tell(row: dict[str, Any]) -> None:
    print(f"lambda {row['lambda']:g}: objective of equation 11, and how many times the least")
    for name, values in sorted(row["weightings"].items(), key=lambda item: item[1]["objective"]):
        print(f"  {name:<22} {values['objective']:>10.4g} {values['times_least']:>9.3g} x   weights {values['distance']:.2f} from the best")


def _draw(path: Path, result: dict[str, Any]) -> None:
    rows, names, count = result["by_lambda"], result["names"], len(result["names"])
    positive = [row for row in rows if row["lambda"] > 0] or rows
    curves = [Line(name, [(row["lambda"], row["weightings"][name]["times_least"]) for row in positive]) for name in rows[0]["weightings"]]
    middle = positive[len(positive) // 2]
    solved = {OPTIMUM: middle["optimum"]["weights"], UGD: middle["ugd"]["weights"], **result["range_weights"]}
    shares = [Line(name, [((k + 0.5) / count, share) for k, share in enumerate(weights)]) for name, weights in solved.items()]
    panels = [
        Panel("objective of equation 11 (1: the least)", curves, "lambda", "times the least", log_x=True, log_y=True),
        Panel(f"weights at lambda {middle['lambda']:g}", shares, f"t / T ({count} ranges, {names[0]} first)", "share", log_y=True),
    ]
    line_chart(path, f"{result['run']}, step {result['checkpoint_step']}: how near weightings come to Pareto's optimum", panels)


def _read(path: Path, config: RunConfig) -> dict[str, Any]:
    """The gradients of an earlier analysis. Raises UserError where there are none of this run."""
    try:
        found = json.loads(path.read_text())
        gram = torch.tensor(found["gram"], dtype=torch.float64)
        fits = gram.dim() == 2 and gram.shape[0] == gram.shape[1] == found["ranges"] >= 2 and bool(gram.isfinite().all())
        fits = fits and len(found["noise_shares"]) == len(gram) and all(map(math.isfinite, found["noise_shares"]))
        own = found["run"] == config.run_dir.name and found["names"] == range_names(len(gram), config.diffusion.schedule.num_timesteps)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--gradients {path} is none that `fasttrain analyse gradients` wrote: {error}") from None
    if not fits or not own:
        raise UserError(f"--gradients {path} is none that `fasttrain analyse gradients` wrote of {config.run_dir}: measure them anew")
    return found
