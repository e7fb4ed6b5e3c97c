"""`fasttrain sample RUN`: images from a run's weights, on one process or many."""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.sampling.images import save_grid, save_npz, save_pngs, to_uint8
from fasttrain.trained import Trained

TIMEOUT_SECONDS = 3600.0
GRID_IMAGES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser, count=100)
    parser.add_argument("--out", type=Path, help="folder for the PNGs, the grid and samples.npz (default: RUN/samples/WEIGHTS)")
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw, taken in turn (default: all)")


def add_generation_arguments(parser: argparse.ArgumentParser, count: int) -> None:
    """What decides the samples: shared with `fasttrain evaluate`."""
    parser.add_argument("run", type=Path, help="run folder of a `fasttrain train`")
    parser.add_argument("--count", type=int, default=count, help=f"how many samples (default {count})")
    parser.add_argument("--batch", type=int, default=128, help="samples made at once by a process (default 128)")
    parser.add_argument("--steps", type=int, default=30, help="steps N of the Heun sampler: 2N - 1 evaluations (default 30)")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of classifier-free guidance (default 1: none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples: sample i is a function of it and i")
    parser.add_argument("--weights", default="ema", help="ema, ema_1 ..., raw, or untrained (default ema)")
    parser.add_argument("--vae", help="hub id or folder that decodes latents (default: the run's data.vae)")


def run(args: argparse.Namespace) -> None:
    with distributed.joined(TIMEOUT_SECONDS) as processes:
        trained = Trained.load(args.run, args.weights, processes.device)
        numbers, labels, images = generate_images(trained, args, processes, wanted=args.labels)
        if processes.is_main:
            _write(args.out or args.run / "samples" / args.weights, numbers, labels, images)


def generate_images(
    trained: Trained, args: argparse.Namespace, processes: Processes, wanted: list[int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Numbers [n], labels [n] and uint8 images [n, H, W, C] of all samples, in order, on rank 0 (empty elsewhere). A collective."""
    generator, decode = trained.generator(args.steps, args.guidance, args.seed), trained.decoder(args.vae)
    labels = None if wanted is None else torch.tensor(wanted).repeat(-(-args.count // len(wanted)))[: args.count]
    if processes.is_main:
        tell_passed_over(trained)
    with Progress(disable=not processes.is_main) as progress:
        task = progress.add_task(f"sampling with {trained.weights} weights of step {trained.step}", total=args.count)
        made = [
            (samples.number.numpy(), samples.labels.numpy(), to_uint8(decode(samples.x0)))
            for samples in generator.generate(
                args.count,
                args.batch,
                labels=labels,
                rank=processes.rank,
                world_size=processes.world_size,
                progress=lambda n: progress.advance(task, n * processes.world_size),
            )
        ]
    parts = [part for share in processes.gather_to_main(made) for part in share]
    if not parts:
        empty = np.zeros(0, np.int64)
        return empty, empty, np.zeros((0, 1, 1, 1), np.uint8)
    numbers, classes, images = (np.concatenate([part[i] for part in parts]) for i in range(3))
    order = np.argsort(numbers)
    return numbers[order], classes[order], images[order]


def tell_passed_over(trained: Trained) -> None:
    """One line for each damaged checkpoint newer than the one used."""
    for damaged in trained.passed_over:
        print(f"passed over a damaged checkpoint: {damaged}")


def _write(out: Path, numbers: NDArray[np.int64], labels: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
    try:
        os.makedirs(out, exist_ok=True)
        save_pngs(out, numbers.tolist(), images)
        save_npz(out / "samples.npz", images, labels)
        save_grid(out / "grid.png", images[:GRID_IMAGES])
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}; make room or choose another folder") from None
    print(f"{len(images)} samples: {out / 'grid.png'}, {out / 'samples.npz'}")
