"""`fasttrain evaluate train-extractor SHARDS --out FILE`: a classifier of a set's images, whose features scores compare."""

import argparse
from contextlib import closing
from pathlib import Path

import torch
from rich.progress import Progress

from fasttrain.commands.destination import try_file, writing_to
from fasttrain.data.config import DataConfig
from fasttrain.data.remote.store import check_address
from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError
from fasttrain.evaluation.extractor import Extractor
from fasttrain.evaluation.extractor_training import train_extractor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="folder or URL of image shards with classes, or a pattern of shards made elsewhere")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="the extractor")
    parser.add_argument("--size", type=int, help="of the images of shards made elsewhere: they are cropped and resized to it")
    parser.add_argument("--steps", type=int, default=600, help="of 128 images (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of what is held out, the first weights and the order (default 0)")


def run(args: argparse.Namespace) -> None:
    check_address(args.shards)
    if args.steps < 1 or not 0 <= args.seed < 2**63:
        raise UserError(f"--steps {args.steps}, --seed {args.seed}: give at least one step, and a seed in [0, 2^63)")
    try_file(args.out)
    with closing(ShardSet.open(args.shards, DataConfig(train=args.shards, size=args.size))) as shards:
        trained = _trained(shards, args)
    with writing_to(args.out, "file"):
        trained.save(args.out)
    record = trained.record
    print(
        f"an extractor of {len(record.classes)} classes tells {record.accuracy:.2%} of {record.held_out} held-out images right "
        f"(trained on {record.trained} others): {args.out}"
    )


def _trained(shards: ShardSet, args: argparse.Namespace) -> Extractor:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Progress() as progress:
        task = progress.add_task("training an extractor", total=args.steps)
        return train_extractor(
            shards,
            Path(args.shards).name,
            steps=args.steps,
            seed=args.seed,
            device=device,
            progress=lambda step: progress.update(task, completed=step),
        )
