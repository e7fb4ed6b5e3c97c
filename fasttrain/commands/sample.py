"""`fasttrain sample RUN`: images from a run's weights, on one process or many."""

import argparse
import os
from pathlib import Path

from fasttrain.commands.generating import TIMEOUT_SECONDS, Made, add_generation_arguments, generate_images, wishes_of
from fasttrain.engine import distributed
from fasttrain.errors import UserError
from fasttrain.files import write_whole
from fasttrain.sampling.images import save_grid, save_npz, save_pngs
from fasttrain.trained import Trained

GRID_IMAGES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser, count=100)
    parser.add_argument(
        "--out", type=Path, help="folder for the PNGs, the grid, samples.npz and captions.txt (default: RUN/samples/WEIGHTS)"
    )
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw, taken in turn (default: all)")


def run(args: argparse.Namespace) -> None:
    with distributed.joined(TIMEOUT_SECONDS) as processes:
        trained = Trained.load(args.run, args.weights, processes.device)
        made = generate_images(trained, args, processes, wishes_of(args, args.labels))
        if processes.is_main:
            _write(args.out or args.run / "samples" / args.weights, made)


def _write(out: Path, made: Made) -> None:
    try:
        os.makedirs(out, exist_ok=True)
        save_pngs(out, made.numbers.tolist(), made.images)
        save_npz(out / "samples.npz", made.images, made.labels)
        save_grid(out / "grid.png", made.images[:GRID_IMAGES])
        if made.asked.prompts is not None:
            write_whole(out / "captions.txt", "".join(f"{made.asked.caption(number)}\n" for number in made.numbers.tolist()))
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}; make room or choose another folder") from None
    print(f"{len(made.images)} samples: {out / 'grid.png'}, {out / 'samples.npz'}")
