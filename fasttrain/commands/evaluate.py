"""`fasttrain evaluate RUN --reference SHARDS`: the distance between a run's samples and real images, its protocol beside it."""

import argparse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fasttrain.commands.generating import (
    TIMEOUT_SECONDS,
    Made,
    add_generation_arguments,
    generate_images,
    guidance_of,
    sampler_of,
    wishes_of,
)
from fasttrain.data.config import DataConfig
from fasttrain.data.remote.store import check_address
from fasttrain.data.shards import ShardSet
from fasttrain.engine import distributed
from fasttrain.errors import UserError
from fasttrain.evaluation.evaluate import evaluate
from fasttrain.evaluation.features import FEATURES
from fasttrain.evaluation.protocol import Protocol
from fasttrain.sampling import SAMPLERS
from fasttrain.trained import Trained

REFERENCE_BATCH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser, count=10_000)
    parser.add_argument(
        "--reference", required=True, help="folder or URL of image shards to compare with, or a pattern of shards made elsewhere"
    )
    parser.add_argument("--size", type=int, help="of the images of shards made elsewhere: they are cropped and resized to it")
    parser.add_argument("--features", default="pixels", choices=FEATURES.names(), help="what is compared (default pixels)")
    parser.add_argument("--out", type=Path, help="JSON file for the score and its protocol (default: RUN/scores/WEIGHTS-FEATURES.json)")


def run(args: argparse.Namespace) -> None:
    check_address(args.reference)
    reference = ShardSet.open(args.reference, DataConfig(train=args.reference, size=args.size))
    if reference.index.kind != "image":
        raise UserError(
            f"--reference {args.reference} holds latents; give a folder made by `fasttrain prepare images` at the samples' size"
        )
    with distributed.joined(TIMEOUT_SECONDS) as processes:
        trained = Trained.load(args.run, args.weights, processes.device)
        made = generate_images(trained, args, processes, wishes_of(args))
        if processes.is_main:
            _score(args, trained, made, reference)


def _score(args: argparse.Namespace, trained: Trained, made: Made, reference: ShardSet) -> None:
    protocol = Protocol(
        reference=PurePosixPath(reference.files.place).name,
        reference_digest=reference.index.xxh3,
        checkpoint_step=trained.step,
        weights=trained.weights,
        sampler=SAMPLERS.spec(sampler_of(args)),
        guidance=guidance_of(args).plain(),
        conditions=made.asked.described(),
        seed=args.seed,
        vae=trained.index.vae.id if trained.index.vae else None,
    )
    score = evaluate([made.images], _images(reference), FEATURES.build(args.features), protocol)
    if reference.damage.unreadable:
        print(f"{reference.damage.unreadable} unreadable samples of {args.reference} are left out")
    out = args.out or args.run / "scores" / f"{args.weights}-{args.features}.json"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        score.save(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}; make room or choose another file") from None
    print(
        f"Frechet distance {score.frechet_distance:.4f} ({args.features}; {score.samples} samples of the {trained.weights} weights "
        f"at step {trained.step}, {score.reference_samples} reference images): {out}"
    )


def _images(shards: ShardSet) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(shards), REFERENCE_BATCH):
        found = shards.gather(np.arange(start, min(start + REFERENCE_BATCH, len(shards))))
        yield found.arrays[found.readable].transpose(0, 2, 3, 1)
