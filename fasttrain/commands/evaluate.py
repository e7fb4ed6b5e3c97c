"""`fasttrain evaluate RUN --reference SHARDS`: how near a run's samples are to real images, one score for each of its weights and steps."""

import argparse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fasttrain.checkpoint import steps_of
from fasttrain.commands.generating import (
    TIMEOUT_SECONDS,
    Drawing,
    add_generation_arguments,
    draw,
    guidance_of,
    sampler_of,
    wishes_of,
)
from fasttrain.data.config import DataConfig
from fasttrain.data.remote.store import check_address
from fasttrain.data.shards import ShardSet
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.evaluation.evaluate import evaluate
from fasttrain.evaluation.features import FEATURES
from fasttrain.evaluation.protocol import Protocol
from fasttrain.registry import shown
from fasttrain.sampling import SAMPLERS
from fasttrain.trained import UNTRAINED, Trained

REFERENCE_BATCH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser, count=10_000)
    parser.add_argument(
        "--weights", nargs="+", default=["ema"], help="ema, ema_1 ..., raw, or untrained; several give a score each (default ema)"
    )
    parser.add_argument(
        "--checkpoint-steps", nargs="+", default=[], metavar="STEP", help="kept checkpoints, or `all`: a score each (default: the newest)"
    )
    parser.add_argument(
        "--reference", required=True, help="folder or URL of image shards to compare with, or a pattern of shards made elsewhere"
    )
    parser.add_argument("--size", type=int, help="of the images of shards made elsewhere: they are cropped and resized to it")
    parser.add_argument("--features", default="pixels", choices=FEATURES.names(), help="what is compared (default pixels)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the scores, step-STEP-WEIGHTS-FEATURES.json each (default: RUN/scores)"
    )


def run(args: argparse.Namespace) -> None:
    check_address(args.reference)
    reference = ShardSet.open(args.reference, DataConfig(train=args.reference, size=args.size))
    if reference.index.kind != "image":
        raise UserError(
            f"--reference {args.reference} holds latents; give a folder made by `fasttrain prepare images` at the samples' size"
        )
    if reference.index.layout == "arrays" and args.size not in (None, reference.index.pixels):
        told = f"{args.reference} was prepared at {reference.index.pixels} and is compared as it is; --size is for shards made elsewhere"
        raise UserError(f"--size {args.size}: {told}: leave it out, or prepare a reference with `fasttrain prepare images --size`")
    with distributed.joined(TIMEOUT_SECONDS) as processes:
        for weights, step in processes.from_main(_asked(args) if processes.is_main else None):
            _score(args, weights, Trained.load(args.run, weights, processes.device, step), reference, processes)


def _asked(args: argparse.Namespace) -> list[tuple[str, int | None]]:
    """The weights and steps that are scored in turn; a network before its first step is scored once."""
    steps: list[int | None] = [*steps_of(args.run)] if args.checkpoint_steps == ["all"] else [*map(_step, args.checkpoint_steps)]
    trained = [(weights, step) for step in steps or [None] for weights in args.weights if weights != UNTRAINED]
    return list(dict.fromkeys([*((weights, None) for weights in args.weights if weights == UNTRAINED), *trained]))


def _step(given: str) -> int:
    if not given.isdecimal():
        raise UserError(f"--checkpoint-steps {shown(given)}: give steps as numbers, or `all` alone")
    return int(given)


def _score(args: argparse.Namespace, weights: str, trained: Trained, reference: ShardSet, processes: Processes) -> None:
    drawing = draw(trained, args, processes, wishes_of(args))
    _check_shape(args, drawing, reference)
    parts = processes.gather_to_main([made.images for made in drawing.batches])
    if not processes.is_main:
        return
    protocol = Protocol(
        reference=PurePosixPath(reference.files.place).name,
        reference_digest=reference.index.xxh3,
        checkpoint_step=trained.step,
        weights=trained.weights,
        sampler=SAMPLERS.spec(sampler_of(args)),
        guidance=guidance_of(args).plain(),
        conditions=drawing.asked.described(),
        seed=args.seed,
        vae=drawing.vae.model_dump(include={"id", "revision", "xxh3"}, exclude_none=True) if drawing.vae else None,
    )
    images = [batch for part in parts for batch in part]
    score = evaluate(images, _images(reference), FEATURES.build(args.features), protocol)
    if reference.damage.unreadable:
        print(f"{reference.damage.unreadable} unreadable samples of {args.reference} are left out")
    folder = args.out or args.run / "scores"
    out = folder / f"step-{trained.step:08d}-{weights}-{args.features}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        score.save(out)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there: {error.strerror}; make room or choose another folder") from None
    print(
        f"Frechet distance {score.frechet_distance:.4f} ({args.features}; {score.samples} samples of the {trained.weights} weights "
        f"at step {trained.step}, {score.reference_samples} reference images): {out}"
    )


def _check_shape(args: argparse.Namespace, drawing: Drawing, reference: ShardSet) -> None:
    """Raises UserError, before anything is sampled, where the images cannot be compared."""
    channels, height, width = reference.index.x0_shape
    if drawing.shape != (height, width, channels):
        told = f"samples are images {drawing.shape}, the reference holds {(height, width, channels)} (H, W, C)"
        raise UserError(f"--reference {args.reference}: {told}: give a reference of the same shape")


def _images(shards: ShardSet) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(shards), REFERENCE_BATCH):
        found = shards.gather(np.arange(start, min(start + REFERENCE_BATCH, len(shards))))
        yield found.arrays[found.readable].transpose(0, 2, 3, 1)
