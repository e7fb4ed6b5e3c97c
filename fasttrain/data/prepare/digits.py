"""scikit-learn's 1,797 handwritten digits, 8 x 8 [Alpaydin & Kaynak 1998, UCI]: real data that comes with an installed package."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from sklearn.datasets import load_digits

from fasttrain.data.facts import RECORDED
from fasttrain.data.index import Source
from fasttrain.data.prepare.assembly import Prepared, prepare_set
from fasttrain.data.prepare.plan import Plan
from fasttrain.data.prepare.writer import Made

_SHARD_SIZE = 600
_FACTS = (8, 8, 0, 0, 1)  # whole, as they are


class DigitMaker:
    """Digits by number: 0 .. 16 of the data set become 0 .. 255."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        self.labels = digits.target.tolist()

    def __call__(self, entries: Sequence[int]) -> Iterator[Made]:
        for entry in entries:
            yield Made(str(entry), (self.images[entry], self.labels[entry]), _FACTS)


def prepare_digits(out: Path) -> Prepared:
    """Writes the digits as shards of uint8 [1, 8, 8], ten classes.

    Raises:
        UserError: out holds something else, or no space is left.
    """
    maker = DigitMaker()
    source = Source(name="scikit-learn digits", xxh3=xxhash.xxh3_128_hexdigest(maker.images.tobytes() + bytes(maker.labels)))
    plan = Plan(
        kind="image",
        shape=(1, 8, 8),
        dtype="uint8",
        classes=tuple(map(str, range(10))),
        source=source,
        entries=range(len(maker.labels)),
        shard_size=_SHARD_SIZE,
        facts=RECORDED,
    )
    prepared = prepare_set(out, plan, maker)
    assert prepared is not None  # rank 0
    return prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `fasttrain prepare digits`."""
    parser.add_argument("out", type=Path, help="folder to write the shards to")


def run(args: argparse.Namespace) -> None:
    """Carries out `fasttrain prepare digits`."""
    print(prepare_digits(args.out).summary(args.out))
