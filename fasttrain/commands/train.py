"""`fasttrain train CONFIG [key=value ...]`: trains, or continues, a run."""

import argparse
import faulthandler
import sys
from pathlib import Path

from fasttrain.config import RunConfig, load_config
from fasttrain.engine import distributed
from fasttrain.engine.activity import Activity
from fasttrain.engine.ancestry import Orphanhood, end_with_parent
from fasttrain.engine.watchdog import Watchdog
from fasttrain.errors import Status
from fasttrain.stopping import Stop, Stopped
from fasttrain.streams import outlive_reader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of the run; run the same command again to continue it")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="values to use instead of the file's, e.g. training.steps=1000 diffusion.weighting.gamma=1",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print parameters, FLOPs and memory per ZeRO stage, read one batch, and exit"
    )
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="write a profiler trace of N steps into the run folder")


def run(args: argparse.Namespace) -> int:
    if args.dry_run:
        from fasttrain.dry_run import dry_run

        dry_run(load_config(args.config, args.overrides))
        return Status.DONE
    outlive_reader()
    stop = Stop()
    stop.listen()
    try:
        end_with_parent()
        faulthandler.enable(file=2)
        return train(load_config(args.config, args.overrides), stop, args.profile)
    except Stopped as stopped:
        print(f"fasttrain: {stopped.told}", file=sys.stderr)
        raise


def train(config: RunConfig, stop: Stop, profile_steps: int = 0) -> int:
    """Trains to the end or to a request to stop. Returns the exit status: see `errors.Status`."""
    from fasttrain.trainer import Trainer

    activity, limit = Activity(), config.training.timeout_seconds
    with (
        distributed.joined(config.collective_seconds) as processes,
        Watchdog(processes, activity, config.run_dir, limit, config.patience, Orphanhood(processes.local_rank == 0)) as watchdog,
    ):
        trainer = Trainer(config, processes, activity)
        done = trainer.fit(stop, watchdog, profile_steps)
    if processes.is_main:
        step, total = trainer.progress.step, config.training.steps
        told = f"trained {step} steps" if done else f"stopped and saved at step {step} of {total}; run the same command to continue"
        print(f"{told}: {config.run_dir}")
    return Status.DONE if done else stop.status
