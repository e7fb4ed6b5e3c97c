"""`fasttrain sample RUN`: images from a run's weights, on one process or many.

The folder holds the last call's samples: PNGs of higher numbers and captions that an earlier call left in it are removed at the end.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np

from fasttrain.commands.destination import writing_to
from fasttrain.commands.generating import (
    TIMEOUT_SECONDS,
    Made,
    add_generation_arguments,
    check_steps,
    draw,
    loaded,
    tell_caution,
    wishes_of,
)
from fasttrain.engine import distributed
from fasttrain.engine.together import on_main
from fasttrain.files import write_whole
from fasttrain.sampling.asked import Asked
from fasttrain.sampling.images import Images, npz_stream, remove_pngs, save_grid, save_pngs

GRID_IMAGES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser, count=100)
    parser.add_argument("--weights", default="ema", help="ema, ema_1 ..., raw, or untrained (default ema)")
    parser.add_argument("--checkpoint-step", type=int, metavar="STEP", help="a kept checkpoint (default: the newest)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the PNGs, the grid, samples.npz and captions.txt, in place of what an earlier call left there "
        "(default: RUN/samples/WEIGHTS, or WEIGHTS-step-STEP with --checkpoint-step)",
    )
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw, taken in turn (default: all)")


def run(args: argparse.Namespace) -> None:
    step = args.checkpoint_step
    check_steps("--checkpoint-step", [args.weights], [] if step is None else [step])
    out = args.out or args.run / "samples" / (args.weights if step is None else f"{args.weights}-step-{step}")
    with distributed.joined(TIMEOUT_SECONDS) as processes, ExitStack() as opened:
        tell_caution(args, processes)
        trained = loaded(args.run, args.weights, processes, step)
        drawing = draw(trained, args, processes, wishes_of(args, args.labels))
        first = next(drawing.batches, None)  # before anything is written: what is asked for may be refused
        batches = chain([first], drawing.batches, repeat(None))  # a rank may have nothing in the last round
        rounds = -(-args.count // (args.batch * processes.world_size))
        # What rank 0 cannot write ends all: nobody makes samples that nobody can keep.
        add = on_main(processes, lambda: opened.enter_context(_files(out, drawing.asked, args.count)))
        for made in islice(batches, rounds):
            parts = [part for part in processes.gather_to_main(made) if part is not None]
            on_main(processes, partial(_add, add, parts, out))
        on_main(processes, opened.close)
        if processes.is_main:
            print(f"{args.count} samples: {out / 'grid.png'}, {out / 'samples.npz'}")


def _add(add: Callable[[Made], None] | None, parts: list[Made], out: Path) -> None:
    assert add is not None
    if parts:
        with writing_to(out):
            add(_in_order(parts))


def _in_order(parts: list[Made]) -> Made:
    """The samples of several ranks in order of their numbers."""
    numbers = np.concatenate([part.numbers for part in parts])
    images = np.concatenate([part.images for part in parts])
    order = np.argsort(numbers)
    labels = [part.labels for part in parts if part.labels is not None]
    return Made(numbers[order], np.concatenate(labels)[order] if labels else None, images[order])


@contextmanager
def _files(out: Path, asked: Asked, count: int) -> Iterator[Callable[[Made], None]]:
    """A function that writes a batch of samples; the grid and the captions follow at the end. Raises UserError."""
    shown: list[Images] = []

    def add(made: Made) -> None:
        save_pngs(out, made.numbers.tolist(), made.images)
        add_to_npz(made.images, made.labels)
        shown.append(made.images[: max(0, GRID_IMAGES - sum(map(len, shown)))])

    with writing_to(out):
        with npz_stream(out / "samples.npz", count) as add_to_npz:
            yield add
        save_grid(out / "grid.png", np.concatenate(shown))
        remove_pngs(out, count)
        captions = out / "captions.txt"
        if asked.prompts is None:
            captions.unlink(missing_ok=True)
        else:
            write_whole(captions, "".join(f"{asked.caption(number)}\n" for number in range(count)))
