"""`fasttrain train CONFIG [key=value ...]`: trains, or continues, a run."""

import argparse
from pathlib import Path

from fasttrain.config import load_config
from fasttrain.engine import distributed


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


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from fasttrain.dry_run import dry_run

        return dry_run(config)
    from fasttrain.trainer import Trainer

    with distributed.joined(config.training.timeout_seconds) as processes:
        trainer = Trainer(config, processes)
        done = trainer.fit(profile_steps=args.profile)
    if processes.is_main:
        step, total = trainer.progress.step, config.training.steps
        told = f"trained {step} steps" if done else f"stopped and saved at step {step} of {total}; run the same command to continue"
        print(f"{told}: {config.run_dir}")
