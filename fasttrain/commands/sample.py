"""`fasttrain sample RUN`: images from a run's weights, on one process or many."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np

from fasttrain.commands.generating import TIMEOUT_SECONDS, Made, add_generation_arguments, draw, wishes_of
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.files import write_whole
from fasttrain.sampling.asked import Asked
from fasttrain.sampling.images import Images, npz_stream, save_grid, save_pngs
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
        out = args.out or args.run / "samples" / args.weights
        first = next(drawing.batches, None)  # before anything is written: what is asked for may be refused
        batches = chain([first], drawing.batches, repeat(None))  # a rank may have nothing in the last round
        rounds = -(-args.count // (args.batch * processes.world_size))
        try:
            with _files(out, drawing.asked, args.count) if processes.is_main else nullcontext(_nothing) as add:
                for made in islice(batches, rounds):
                    _together(made, add, processes)
        except OSError as error:
            raise UserError(_cannot(out, error)) from None
        if processes.is_main:
            print(f"{args.count} samples: {out / 'grid.png'}, {out / 'samples.npz'}")


def _together(made: Made | None, add: Callable[[Made], None], processes: Processes) -> None:
    """Writes what all ranks made in a round; a disk that is full ends it on all of them. A collective."""
    parts = [part for part in processes.gather_to_main(made) if part is not None]
    problem: OSError | None = None
    try:
        if parts:
            add(_in_order(parts))
    except OSError as error:
        problem = OSError(error.errno, error.strerror)
    if problem := processes.from_main(problem):
        raise problem


def _in_order(parts: list[Made]) -> Made:
    """The samples of several ranks in order of their numbers."""
    numbers = np.concatenate([part.numbers for part in parts])
    images = np.concatenate([part.images for part in parts])
    order = np.argsort(numbers)
    labels = [part.labels for part in parts if part.labels is not None]
    return Made(numbers[order], np.concatenate(labels)[order] if labels else None, images[order])


@contextmanager
def _files(out: Path, asked: Asked, count: int) -> Iterator[Callable[[Made], None]]:
    """A function that writes a batch of samples; the grid and the captions follow at the end."""
    shown: list[Images] = []

    def add(made: Made) -> None:
        save_pngs(out, made.numbers.tolist(), made.images)
        add_to_npz(made.images, made.labels)
        shown.append(made.images[: max(0, GRID_IMAGES - sum(map(len, shown)))])

    with npz_stream(out / "samples.npz", count) as add_to_npz:
        yield add
    save_grid(out / "grid.png", np.concatenate(shown))
    if asked.prompts is not None:
        write_whole(out / "captions.txt", "".join(f"{asked.caption(number)}\n" for number in range(count)))


def _nothing(made: Made) -> None:
    """What a rank writes that is not the main one."""


def _cannot(out: Path, error: OSError) -> str:
    return f"--out {out}: cannot write there: {error.strerror}; make room or choose another folder"
