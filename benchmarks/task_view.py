"""The multi-task view of the Min-SNR paper, measured over networks: is Min-SNR the weighting nearest to Pareto's optimum (figure 4)?

    python -m benchmarks.task_view --work DIR [--minutes N] [--workers N] [--seeds N] [--steps N] [--samples N]

Networks of digits, x0, are trained with each weighting of the paper (const, SNR, max-SNR, Min-SNR-5) and from each seed. On each of them,
untrained, early, middle and late, `fasttrain analyse pareto` compares the weightings by the objective of equation 11: on several, since a
network that was trained with a weighting comes to where that weighting's own sum of gradients is small. The paper gives no lambda: several
are told, in units of the mean squared gradient; a large one favours equal weights whatever the gradients are.

On the networks at the end: `finetune` (figure 2), `instability` (figure 3, supplement figure 8), `ranges` (figure 6), `consistency` of
seeds and weightings, `interpolate`, `hessian`. One JSON, one picture.

What DIR holds is not computed again. Killed, or out of `--minutes`, the same command goes on; the exit status says so: 75. DIR comes to
about a gigabyte of checkpoints and fine-tunings. Seconds of each command are kept; costs of UGD are quotients of times of one process.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.convergence_folder import held
from benchmarks.environment import environment, results_folder
from benchmarks.miniature_runs import CommandFailed, Laboratory, TimeIsUp
from benchmarks.task_view_summary import summary
from benchmarks.task_view_tables import NAME, claim_rows, draw, other_rows, pareto_rows, verdict
from benchmarks.task_view_work import CONFIG, Folder, Plan, Worker
from benchmarks.whole_file import write_json
from fasttrain.errors import UserError

RESULT = results_folder(torch.device("cpu")) / f"{NAME}.json"
CONTINUE = 75  # EX_TEMPFAIL: not a failure, the same command goes on


def result_of(folder: Folder, plan: Plan) -> dict[str, Any]:
    """What a whole folder holds, as JSON."""
    return {
        "benchmark": NAME,
        "environment": environment(torch.device("cpu")),
        "settings": {**plan.plain(), "points": list(plan.points), "config": CONFIG},
        **summary(folder, plan),
    }


def show(result: dict[str, Any]) -> None:
    """The tables and the verdict on the screen."""
    tables.show(*pareto_rows(result), title="equation 11: Min-SNR's objective over the best other's (const, SNR, max-SNR)")
    tables.show(*claim_rows(result), title="which weighting is the nearest to the optimum, in how many networks")
    tables.show(*other_rows(result), title="the other analyses")
    print("\n".join(verdict(result)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, or goes on. Returns 0 when all is measured, 75 when the same command goes on, 1 or 2 when something went wrong."""
    args = _parser().parse_args(arguments)
    try:
        plan = Plan(args.seeds, args.steps, args.ranges, args.samples, args.images, args.weights, tuple(args.regularisations))
        folder = Folder(args.work.resolve())
        with held(folder.root):
            Worker(Laboratory(folder.root, args.minutes), folder, plan).run(args.workers)
            result = result_of(folder, plan)
    except TimeIsUp as told:
        print(f"{told}; the same command goes on")
        return CONTINUE
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    write_json(args.out, result)
    draw(args.out.with_suffix(".png"), result)
    show(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything; the same command goes on from it")
    parser.add_argument("--minutes", type=float, default=60, help="the most it may take (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="commands at a time, one core each (%(default)s)")
    parser.add_argument("--seeds", type=int, default=Plan.seeds, help="networks of each weighting (%(default)s)")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of training, a multiple of 16 (%(default)s)")
    parser.add_argument("--ranges", type=int, default=Plan.ranges, help="equal ranges of timesteps (%(default)s)")
    parser.add_argument("--samples", type=int, default=Plan.samples, help="of a range's gradient, a multiple of 16 (%(default)s)")
    parser.add_argument("--images", type=int, default=Plan.images, help="of each network, for consistency (%(default)s)")
    parser.add_argument("--weights", default=Plan.weights, help="on which gradients are taken: raw, or ema (%(default)s)")
    parser.add_argument(
        "--lambda", dest="regularisations", type=float, nargs="+", default=list(Plan.regularisations), help="of equation 11 (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
