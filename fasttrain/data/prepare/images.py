"""A tree of class folders, or a tar of one, becomes shards of square RGB images."""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from fasttrain.data.crops import Scale
from fasttrain.data.facts import RECORDED
from fasttrain.data.index import Source
from fasttrain.data.prepare.assembly import Prepared, prepare_set
from fasttrain.data.prepare.captions import Captions, Wanted, add_caption_arguments, captions_wanted, list_uncaptioned
from fasttrain.data.prepare.pixels import Crop, Square, Unreadable, read_square
from fasttrain.data.prepare.plan import Plan
from fasttrain.data.prepare.source import Entry, open_source, read_place
from fasttrain.data.prepare.writer import Made
from fasttrain.errors import UserError

USUAL_SCALE = (0.9, 1.0)


class Read(NamedTuple):
    """What was read of one entry."""

    square: Square
    caption: str | None


@dataclass(frozen=True)
class ImageMaker:
    """Files of a source to squares of `size` pixels a side: the centre, or of `crop_scale` of the largest square's area, anywhere."""

    path: Path
    size: int
    crop_scale: Scale | None = None
    captions: Captions | None = None

    def read(self, entry: Entry) -> Read | Unreadable:
        """One file, or why not. A random crop is a function of the file's name, whatever else the source holds."""
        crop = None if self.crop_scale is None else Crop(self.crop_scale, xxhash.xxh3_64_intdigest(entry.name.encode()) >> 1)
        if entry.label_place:
            read_place(self.path, entry.label_place)  # a label that has changed since it was listed is told; its value is the listed one
        try:
            caption = self.captions.read(entry) if self.captions else None
            return Read(read_square(read_place(self.path, entry.image), self.size, crop), caption)
        except Unreadable as reason:
            return reason

    def __call__(self, entries: Sequence[Entry]) -> Iterator[Made]:
        for entry in entries:
            read = self.read(entry)
            if isinstance(read, Unreadable):
                yield Made(entry.name, read)
            else:
                yield Made(entry.name, (read.square.pixels, entry.label), read.square.facts, read.caption)


def prepare_images(
    source: Path,
    out: Path,
    size: int,
    shard_size: int = 4096,
    workers: int = 1,
    crop_scale: Scale | None = None,
    wanted: Wanted | None = None,
) -> Prepared:
    """Writes the images of a source as shards of uint8 [3, size, size]; the classes are the folders, sorted by name.

    Args:
        source: folder of class folders, or a tar of one (.tar, .tar.gz, .tar.bz2, .tar.xz), or a pattern of WebDataset shards.
        out: folder for the shards.
        size: pixels a side.
        shard_size: images a shard at most.
        workers: processes.
        crop_scale: least and most area of a random crop, as a share of the largest square's; None: that square, from the centre.
        wanted: captions to be kept; None: none.

    Raises:
        UserError: a source that is missing or holds no class folders, an out that holds another set, no space left.
    """
    if size < 1 or shard_size < 1:
        raise UserError(f"--size and --shard-size must be at least 1; got {size} and {shard_size}")
    with open_source(source, out, wanted.kind if wanted else None) as listing:
        plan = Plan(
            kind="image",
            shape=(3, size, size),
            dtype="uint8",
            classes=listing.classes,
            source=Source(name=listing.name, xxh3=listing.xxh3),
            entries=listing.entries,
            shard_size=shard_size,
            facts=RECORDED,
            captions=wanted is not None,
            settings={**crop_settings(crop_scale), **(wanted.settings() if wanted else {})},
        )
        captions = Captions(listing.path, wanted.required) if wanted else None
        prepared = prepare_set(out, plan, ImageMaker(listing.path, size, crop_scale, captions), workers=workers)
        assert prepared is not None  # rank 0
        return replace(prepared, uncaptioned=list_uncaptioned(out, plan, captions)) if captions else prepared


def crop_settings(scale: Scale | None) -> Mapping[str, Any]:
    """What a plan says of random crops."""
    return {} if scale is None else {"crop_scale": list(scale)}


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_crop_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which square of an image is kept."""
    low, high = USUAL_SCALE
    parser.add_argument(
        "--crop", choices=("centre", "random"), default="centre", help="the square that is kept: the whole short side, or any (%(default)s)"
    )
    parser.add_argument(
        "--crop-scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"area of a random crop, of the largest square's (default {low:g} {high:g}; 0.4 0.6 to pre-train for a larger size)",
    )


def crop_scale_of(args: argparse.Namespace) -> Scale | None:
    """The scale of random crops; None for the centre. Raises UserError."""
    if args.crop == "centre":
        if args.crop_scale is not None:
            raise UserError("--crop-scale goes with --crop random; the centre crop is the largest square")
        return None
    low, high = args.crop_scale or USUAL_SCALE
    if not 0 < low <= high <= 1:
        raise UserError(f"--crop-scale must be two shares with 0 < LOW <= HIGH <= 1, got {low:g} {high:g}")
    return low, high


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `fasttrain prepare images`."""
    parser.add_argument(
        "source", type=Path, help="folder with one sub-folder a class, or a tar of one (also .tar.xz), or WebDataset shards"
    )
    parser.add_argument("out", type=Path, help="folder to write the shards to")
    parser.add_argument("--size", type=int, required=True, help="pixels a side")
    parser.add_argument("--shard-size", type=int, default=4096, help="images a shard at most (%(default)s)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (%(default)s, one a core)")
    add_crop_arguments(parser)
    add_caption_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Carries out `fasttrain prepare images`."""
    crop, wanted = crop_scale_of(args), captions_wanted(args)
    prepared = prepare_images(args.source, args.out, args.size, args.shard_size, args.workers, crop, wanted)
    print(prepared.summary(args.out))
