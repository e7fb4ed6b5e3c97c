"""A tree of class folders, or a tar of one, becomes shards of square RGB images."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fasttrain.data.index import Source
from fasttrain.data.prepare.assembly import Prepared, prepare_set
from fasttrain.data.prepare.pixels import Unreadable, read_square
from fasttrain.data.prepare.plan import Plan
from fasttrain.data.prepare.source import Entry, open_source, read_entry
from fasttrain.data.prepare.writer import Made
from fasttrain.errors import UserError


@dataclass(frozen=True)
class ImageMaker:
    """Files of a source to squares of `size` pixels a side."""

    path: Path
    size: int

    def read(self, entry: Entry) -> np.ndarray | Unreadable:
        """One file as uint8 [3, size, size], or why not."""
        try:
            return read_square(read_entry(self.path, entry), self.size)
        except Unreadable as reason:
            return reason

    def __call__(self, entries: Sequence[Entry]) -> Iterator[Made]:
        for entry in entries:
            image = self.read(entry)
            yield Made(entry.name, image if isinstance(image, Unreadable) else (image, entry.label))


def prepare_images(source: Path, out: Path, size: int, shard_size: int = 4096, workers: int = 1) -> Prepared:
    """Writes the images of a source as shards of uint8 [3, size, size]; the classes are the folders, sorted by name.

    Args:
        source: folder of class folders, or a tar of one (.tar, .tar.gz, .tar.bz2, .tar.xz).
        out: folder for the shards.
        size: pixels a side.
        shard_size: images a shard at most.
        workers: processes.

    Raises:
        UserError: a source that is missing or holds no class folders, an out that holds another set, no space left.
    """
    if size < 1 or shard_size < 1:
        raise UserError(f"--size and --shard-size must be at least 1; got {size} and {shard_size}")
    with open_source(source, out) as listing:
        plan = Plan(
            kind="image",
            shape=(3, size, size),
            dtype="uint8",
            classes=listing.classes,
            source=Source(name=listing.name, xxh3=listing.xxh3),
            entries=listing.entries,
            shard_size=shard_size,
        )
        prepared = prepare_set(out, plan, ImageMaker(listing.path, size), workers=workers)
    assert prepared is not None  # rank 0
    return prepared


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `fasttrain prepare images`."""
    parser.add_argument("source", type=Path, help="folder with one sub-folder a class, or a tar of one (also .tar.xz)")
    parser.add_argument("out", type=Path, help="folder to write the shards to")
    parser.add_argument("--size", type=int, required=True, help="pixels a side")
    parser.add_argument("--shard-size", type=int, default=4096, help="images a shard at most (%(default)s)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (%(default)s, one a core)")


def run(args: argparse.Namespace) -> None:
    """Carries out `fasttrain prepare images`."""
    print(prepare_images(args.source, args.out, args.size, args.shard_size, args.workers).summary(args.out))
