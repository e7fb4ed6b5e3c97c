"""`fasttrain sample RUN`: images from a run's weights, on one process or many."""

import argparse
import os
from pathlib import Path

import numpy as np

from fasttrain.commands.generating import TIMEOUT_SECONDS, Drawing, Made, add_generation_arguments, draw, wishes_of
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.files import write_whole
from fasttrain.sampling.asked import Asked
from fasttrain.sampling.images import save_grid, save_npz, save_pngs
from fasttrain.trained import Trained

GRID_IMAGES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser, count=100)
    parser.add_argument("--weights", default="ema", help="ema, ema_1 ..., raw, or untrained (default ema)")
    parser.add_argument("--checkpoint-step", type=int, metavar="STEP", help="a kept checkpoint (default: the newest)")
    parser.add_argument(
        "--out", type=Path, help="folder for the PNGs, the grid, samples.npz and captions.txt (default: RUN/samples/WEIGHTS)"
    )
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw, taken in turn (default: all)")


def run(args: argparse.Namespace) -> None:
    with distributed.joined(TIMEOUT_SECONDS) as processes:
        trained = Trained.load(args.run, args.weights, processes.device, args.checkpoint_step)
        drawing = draw(trained, args, processes, wishes_of(args, args.labels))
        made = _all(drawing, processes)
        if processes.is_main:
            _write(args.out or args.run / "samples" / args.weights, drawing.asked, made)


def _all(drawing: Drawing, processes: Processes) -> Made:
    """All samples in order of their numbers, on rank 0; empty elsewhere."""
    parts = [part for share in processes.gather_to_main(list(drawing.batches)) for part in share]
    if not parts:
        return Made(np.zeros(0, np.int64), None, np.zeros((0, 1, 1, 1), np.uint8))
    numbers, images = (np.concatenate(arrays) for arrays in ([part.numbers for part in parts], [part.images for part in parts]))
    order = np.argsort(numbers)
    labels = [part.labels for part in parts if part.labels is not None]
    return Made(numbers[order], np.concatenate(labels)[order] if labels else None, images[order])


def _write(out: Path, asked: Asked, made: Made) -> None:
    try:
        os.makedirs(out, exist_ok=True)
        save_pngs(out, made.numbers.tolist(), made.images)
        save_npz(out / "samples.npz", made.images, made.labels)
        save_grid(out / "grid.png", made.images[:GRID_IMAGES])
        if asked.prompts is not None:
            write_whole(out / "captions.txt", "".join(f"{asked.caption(number)}\n" for number in made.numbers.tolist()))
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}; make room or choose another folder") from None
    print(f"{len(made.images)} samples: {out / 'grid.png'}, {out / 'samples.npz'}")
