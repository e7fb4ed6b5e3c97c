"""What the analyses of a run's loss landscape have in common: their arguments, and the loss on fixed samples."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fasttrain.commands.analyses.output import add_output_argument
from fasttrain.config import RunConfig
from fasttrain.dataset import open_data
from fasttrain.diffusion.timestep_weights import Pareto
from fasttrain.diffusion.timesteps import TIMESTEPS
from fasttrain.diffusion.weighting import WEIGHTINGS
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.fixed_loss import FixedLoss

TRAINING, HELD_OUT = "training", "held-out"


def add_landscape_arguments(parser: argparse.ArgumentParser) -> None:
    """Run, weights and samples."""
    parser.add_argument("run", type=Path, help="run folder of a `fasttrain train`; what is found is written to its analysis/, or to --out")
    parser.add_argument("--weights", default="ema", help="ema, ema_1 ..., raw, or untrained (default ema)")
    parser.add_argument("--samples", type=int, default=512, help="images with their noise and timesteps, always the same (default 512)")
    parser.add_argument("--batch", type=int, default=64, help="of them at once on each process (default 64)")
    add_output_argument(parser)


@contextmanager
def fixed_losses(args: argparse.Namespace, config: RunConfig, processes: Processes, images: list[str]) -> Iterator[dict[str, FixedLoss]]:
    """The loss of a run on each of these kinds of images.

    Raises:
        UserError: numbers that cannot be, or no such images.
    """
    for option in ("samples", "batch"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} must be positive, got {getattr(args, option)}")
    if isinstance(config.diffusion.weighting, Pareto) and processes.is_main:
        print("weighting pareto changes during a run: every timestep counts alike here, as before its first solution")
    if config.diffusion.uncertainty and processes.is_main:
        print("the run divides its loss by a learned uncertainty: here it is the weighted loss alone, and the uncertainty stays as it is")
    data, losses = open_data(config), {}
    try:
        for kind in images:
            losses[kind] = FixedLoss(config, data, processes, args.samples, args.batch, kind == HELD_OUT)
        yield losses
    finally:
        for loss in losses.values():
            loss.close()
        data.close()


def looked_at(network: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights that the loss is a function of, by name: all but those of a learned uncertainty."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad and not name.startswith("uncertainty.")}


def told(args: argparse.Namespace, config: RunConfig, processes: Processes) -> dict[str, Any]:
    """What a result must say of the loss that it is of."""
    diffusion = config.diffusion
    return {
        "run": config.run_dir.name,
        "loss": {
            "prediction": config.plain()["diffusion"]["prediction"],
            "weighting": WEIGHTINGS.spec(diffusion.weighting),
            "timesteps": TIMESTEPS.spec(diffusion.timesteps),
            "label_drop": diffusion.label_drop,
            "uncertainty": "left out, in the loss and among the weights" if diffusion.uncertainty else None,
        },
        "samples": args.samples,
        "seed": config.seed,
        "world_size": processes.world_size,
    }
