"""What the analyses of a run's x0 losses by timestep range have in common: their arguments, and what is measured with."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.commands.analyses.output import add_output_argument
from fasttrain.commands.generating import check_steps, loaded, tell_passed_over
from fasttrain.dataset import open_data
from fasttrain.diffusion.timestep_weights import MOST_RANGES
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.range_losses import Draws, RangeLosses, range_names
from fasttrain.research.gradients import RangeGradients, range_gradients
from fasttrain.trained import Trained

TIMEOUT_SECONDS = 3600.0
GIB = 1 << 30


class Subject(NamedTuple):
    """What is looked at, and with what."""

    trained: Trained
    losses: RangeLosses
    processes: Processes

    def told(self, args: argparse.Namespace) -> dict[str, Any]:
        """What a result must say of where it comes from."""
        config = self.trained.config
        return {
            "run": config.run_dir.name,
            "weights": self.trained.weights,
            "checkpoint_step": self.trained.step,
            "images": args.images,
            "ranges": args.ranges,
            "names": range_names(args.ranges, config.diffusion.schedule.num_timesteps),
            "samples_per_range": args.samples,
            "label_drop": config.diffusion.label_drop,
            "world_size": self.processes.world_size,
        }


def add_measuring_arguments(parser: argparse.ArgumentParser, samples: int = 512) -> None:
    """Run, weights, ranges and samples."""
    parser.add_argument("run", type=Path, help="run folder of a `fasttrain train`; what is found is written to its analysis/, or to --out")
    parser.add_argument("--weights", default="ema", help="ema, ema_1 ..., raw, or untrained (default ema)")
    parser.add_argument("--ranges", type=int, default=10, help="equal ranges of timesteps (default 10)")
    parser.add_argument("--samples", type=int, default=samples, help=f"images with their noise for each range (default {samples})")
    parser.add_argument("--batch", type=int, default=64, help="of them at once on each process (default 64)")
    parser.add_argument("--images", default="training", choices=("training", "held-out"), help="which images (default training)")
    add_output_argument(parser)


def add_gradient_arguments(parser: argparse.ArgumentParser) -> None:
    """What only gradients need."""
    parser.add_argument(
        "--memory", type=float, default=4.0, help="GiB for gradients (default 4); with less, samples are gone through more often"
    )
    parser.add_argument("--checkpoint-step", type=int, metavar="N", help="a kept checkpoint (default: the newest)")


@contextmanager
def subject(args: argparse.Namespace, processes: Processes, step: int | None = None) -> Iterator[Subject]:
    """Opens the run. A collective.

    Raises:
        UserError: no run, no such weights, no such images, or numbers that cannot be.
    """
    if not 2 <= args.ranges <= MOST_RANGES:
        raise UserError(f"--ranges must lie between 2 and {MOST_RANGES}, got {args.ranges}")
    for option in ("samples", "batch"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} must be positive, got {getattr(args, option)}")
    check_steps("--checkpoint-step", [args.weights], [] if step is None else [step])
    trained = loaded(args.run, args.weights, processes, step)
    if processes.is_main:
        tell_passed_over(trained)
    data = open_data(trained.config)
    losses = RangeLosses(trained.config, data, processes, args.images == "held-out")
    try:
        yield Subject(trained, losses, processes)
    finally:
        losses.close()
        data.close()


def draws_of(args: argparse.Namespace, samples: int | None = None, first: int = 0) -> Draws:
    """The samples that are asked for, in two halves. Raises UserError for an odd number."""
    samples = args.samples if samples is None else samples
    if samples % 2:
        raise UserError(f"{samples} samples a range are an odd number, and two halves are compared: give an even one")
    return Draws(args.ranges, samples // 2, args.batch, first)


def measure_gradients(on: Subject, draws: Draws, memory: float) -> RangeGradients:
    """The gradients of all ranges. A collective. Raises UserError for no memory."""
    if not memory > 0:
        raise UserError(f"--memory must be positive, got {memory}")
    network = on.trained.network
    return range_gradients(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lambda number, half: (loss.loss for loss in on.losses.batches(network, draws, number, half)),
        draws.ranges,
        room=int(memory * GIB),
        total=on.processes.sum,
    )
