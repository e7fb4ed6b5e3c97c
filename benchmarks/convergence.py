"""How many fewer images a way of training needs for a quality: any arms, any data set, an answer with an interval.

    python -m benchmarks.convergence PRESET --work DIR [--minutes N] [--workers N | --gpus 0 1 ...] [--images FILE] [--dry-run]

PRESET is one of benchmarks/presets (digits-smoke, digits, digits-full, gamma, strategies, recipe, cifar10, imagenet256 ...) or a YAML file
of the same form. Every arm is trained with `fasttrain train` from paired seeds (the same images, noise, timesteps, initial weights and
samples), its kept checkpoints are scored with `fasttrain evaluate` with each average, and the best average counts at each point, so that
it is not the average's length that is compared; the result with one fixed length stands beside it.

What DIR holds is not computed again: whole trainings, checkpoints and scores; a training goes on from its last checkpoint. Killed, or out
of `--minutes`, the same command goes on; the exit status says so: 75. Comparisons of one data set may share DIR: what is the same run in
both, whatever its arm is called, is made once.
Thresholds are what every run of a group's baseline had reached at fractions of the budget, chosen before any other arm is looked at.
A speed-up is the geometric mean over the seeds of (images of the baseline) / (images of the arm), with Student's t-interval (95 %); an
interval holds for its own threshold, not for all at once. What was not reached is a bound; of bounds the interval's safe end alone is
told. A contender that diverged in any seed is not called faster, and one pair of runs decides nothing.

On GPUs: `--gpus 0 1 2` trains three arms at a time, and one arm at a time on eight:
`--gpus 0,1,2,3,4,5,6,7 --launcher "fasttrain supervise -- deepspeed --module fasttrain"`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.convergence_folder import Folder, held
from benchmarks.convergence_presets import FILES, Preset, Run, names, read_preset
from benchmarks.convergence_summary import summary
from benchmarks.convergence_tables import draw, speed_up_rows, told
from benchmarks.convergence_work import Worker
from benchmarks.environment import environment, results_folder
from benchmarks.miniature_runs import CommandFailed, Laboratory, TimeIsUp, side_by_side
from benchmarks.whole_file import write_json
from fasttrain.data.remote.addresses import scheme_of
from fasttrain.errors import UserError

CONTINUE = 75  # EX_TEMPFAIL: not a failure, the same command goes on
FORGOTTEN = 600.0  # minutes that no `--minutes` means: more than any of these takes on two cores


def compare(worker: Worker, workers: int) -> list[str]:
    """Does what is left to do, so many runs at a time; what went wrong in runs, while all others were done.

    Raises:
        TimeIsUp: the next call goes on.
    """
    worker.folder.begin()
    try:
        worker.prepare()
    except CommandFailed as error:
        return [str(error)]
    told = side_by_side([partial(_done, worker, run) for run in worker.folder.distinct()], workers)
    if late := next((outcome for outcome in told if isinstance(outcome, TimeIsUp)), None):
        raise late
    return [str(outcome) for outcome in told if outcome is not None]


def _done(worker: Worker, run: Run) -> Exception | None:
    """What kept a run from being whole."""
    try:
        worker.do(run)
    except (TimeIsUp, CommandFailed) as error:
        return error
    return None


def result_of(name: str, folder: Folder, preset: Preset, device: torch.device) -> dict[str, Any]:
    """The comparison as JSON holds it."""
    return {
        "benchmark": "convergence",
        "name": name,
        "environment": environment(device),
        "preset": preset.plain(),
        **summary(folder),
    }


def show(result: dict[str, Any]) -> None:
    """The table on the screen: best average, then the fixed one."""
    if not result["groups"]:
        print("no seed has all of its arms yet")
        return
    tables.show(*speed_up_rows(result), title=told(result["environment"]["device"], result))
    tables.show(*speed_up_rows(result, "fixed"), title=f"the same with {result['preset']['score']['fixed']} everywhere")


def dry_run(preset: Preset) -> None:
    """Every arm's config loaded, and what would be done; nothing is written."""
    for run in preset.runs():
        config = preset.config_of(run)
        if run.seed == 0:
            print(f"{run.group} {run.arm}: {' '.join(preset.overrides_of(run))}")
    images = preset.steps * config.training.global_batch
    scores = len(preset.points) * len(preset.score.weights)
    print(f"{len(list(preset.runs()))} trainings of {images:,} images, {scores} scores of {preset.score.count:,} samples each")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or continues a comparison. Returns 0 when it is whole, 75 when the same command goes on, 1 when a run went wrong."""
    args = _parser().parse_args(arguments)
    try:
        preset = read_preset(args.preset)
        if args.dry_run:
            dry_run(preset)
            return 0
        return _run(args, preset)
    except UserError as error:
        print(f"convergence: {error}", file=sys.stderr)
        return error.status


def _run(args: argparse.Namespace, preset: Preset) -> int:
    device = torch.device("cuda" if args.gpus else "cpu")
    # A process that is forked from one that has met a GPU cannot use it.
    launcher = shlex.split(args.launcher) if args.launcher else [sys.executable, "-m", "fasttrain"] if args.gpus else []
    given = {name: place for name in FILES if (place := getattr(args, name)) is not None}
    whole = preset.filled({name: _from_anywhere(place) for name, place in given.items()})
    # A result names files and not the folders of this machine.
    named = preset.filled({name: Path(place).name for name, place in given.items()})
    with held(args.work):
        folder = Folder(args.work, whole)
        worker = Worker(folder, Laboratory(args.work, args.minutes), launcher, args.gpus, args.keep_runs)
        status = _status(worker, len(args.gpus) or args.workers)
        result = result_of(Path(args.preset).stem, folder, named, device)
        write_json(args.work / "result.json", result)
    show(result)
    if status == 0:
        out = args.out or results_folder(device) / f"convergence-{Path(args.preset).stem}.json"
        write_json(out, result)
        draw(out.with_suffix(".png"), result)
        print(f"written: {out} and its PNG")
    return status


def _status(worker: Worker, workers: int) -> int:
    """Does the work, tells what went wrong, and with what the command ends."""
    try:
        failed = compare(worker, workers)
    except TimeIsUp as late:
        print(f"{late}; the same command goes on")
        return CONTINUE
    for message in failed:
        print(message, file=sys.stderr)
    return int(bool(failed))


def _from_anywhere(place: str) -> str:
    """A path as it is found from any folder; addresses stay."""
    return place if scheme_of(place) else str(Path(place).absolute())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help=f"{', '.join(names())}, or a YAML file")
    parser.add_argument("--work", type=Path, default=Path("build/convergence"), help="folder of the work, continued if it is begun")
    parser.add_argument("--minutes", type=float, default=FORGOTTEN, help="the most that this call may take (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time on a CPU, one core each (%(default)s)")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="DEVICES", help="CUDA_VISIBLE_DEVICES of each run that is made at a time")
    parser.add_argument("--launcher", help="what starts `train` and `evaluate`, in words before these")
    parser.add_argument("--images", help="pictures to prepare, for presets that need them")
    parser.add_argument("--reference", help="reference set or statistics, for presets that need them")
    parser.add_argument("--features", help="file of the features' network, for presets that need one")
    parser.add_argument("--keep-runs", action="store_true", help="keep trainings that are scored; they are large")
    parser.add_argument("--dry-run", action="store_true", help="load every arm's config, tell what would be done, and write nothing")
    parser.add_argument("--out", type=Path, help="the result (default: benchmarks/results/DEVICE/convergence-PRESET.json)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
