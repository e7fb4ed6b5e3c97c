"""What a text encoder makes of a set's captions, in a folder of its own: another encoder or other captions never touch the images.

Each distinct caption is encoded once. Captions are cut into parts by number, and into batches by number within a part: a preparation that
was killed goes on with the parts that are missing, and gives the same bytes.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from fasttrain.data.foreign.pattern import pattern_of
from fasttrain.data.prepare.plan import claim
from fasttrain.data.prepare.progress import FolderProgress, speed
from fasttrain.data.prepare.writer import RECEIPTS, TEMPORARY, space_error, write_whole
from fasttrain.data.text.captions import DEFAULT_TEMPLATE, distinct
from fasttrain.data.text.encoder import Encoded, TextEncoder
from fasttrain.data.text.origin import Captioned, captions_of
from fasttrain.data.text.table import CAPTIONS_FILE, FIRST_FILE, FORMAT, OWN_FOLDER, ROWS_FILE, TEXT_FILE, Part, TextIndex, part_names
from fasttrain.errors import UserError
from fasttrain.files import digest, whole

UNCAPTIONED_FILE = "uncaptioned.txt"
HEAD = 16  # captions that text.json names


@dataclass(frozen=True)
class TextPlan:
    """A set's text: whose captions, through which encoder, and how they are cut into batches and parts."""

    captioned: Captioned
    encoder: TextEncoder
    batch: int
    part_size: int

    @cached_property
    def table(self) -> tuple[list[str], np.ndarray]:
        """The distinct captions, and which of them each sample has."""
        return distinct(self.captioned.captions)

    @property
    def num_parts(self) -> int:
        """As few as hold part_size captions at most."""
        return -(-len(self.table[0]) // self.part_size)

    def captions_of(self, number: int) -> list[str]:
        """A part's captions."""
        return self.table[0][number * self.part_size : (number + 1) * self.part_size]

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes, as plain JSON."""
        captions = xxhash.xxh3_128_hexdigest("\n".join(self.captioned.captions).encode())
        return {
            "format": FORMAT,
            "samples": self.captioned.digests_xxh3,
            "captions": captions,
            "made_of": self.captioned.made_of.model_dump(),
            "encoder": self.encoder.record.model_dump(),
            "batch": self.batch,
            "part_size": self.part_size,
        }


class PartReceipt(BaseModel):
    """What a finished part holds: the tokens of each caption, how many were longer and the longest, and each channel's sums."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: Part
    lengths: list[int]
    cut: int
    longest: int
    total: list[float]
    squares: list[float]


@dataclass(frozen=True)
class PreparedText:
    """A finished text: what it is, where its captions come from, how many this run encoded, and in how many seconds."""

    text: TextIndex
    told: str
    made: int
    seconds: float

    def summary(self, out: Path) -> str:
        """What to tell the user at the end."""
        text, record = self.text, self.text.encoder
        notes = f" ({speed(self.made / self.seconds, 'captions')})" if self.made else " (nothing left to do: all parts verified)"
        if text.cut:
            notes += f"; {text.cut:,} longer than {record.tokens} tokens, cut to them (the longest has {text.longest})"
        if text.without:
            notes += f"; {text.without:,} samples without a caption, which get the empty one, listed in {UNCAPTIONED_FILE}"
        shapes = f"{record.tokens} x {record.width} and {record.pooled}"
        return f"{out}: {text.captions:,} captions of {text.samples:,} samples ({self.told}), {shapes} by {record.id}{notes}"


def prepare_text(
    place: str,
    out: Path,
    encoder: TextEncoder,
    template: str | None = None,
    names: Path | None = None,
    batch: int = 64,
    part_size: int = 4096,
) -> PreparedText:
    """Makes what is missing of a set's text.

    Args:
        place: folder of a prepared set, or a pattern or folder of WebDataset shards.
        out: folder for the text; made if need be.
        encoder: on its device.
        template, names: captions of the classes, see `captions_of`.
        batch: captions encoded at once; with the device it decides the last bits.
        part_size: captions in a file at most.

    Raises:
        UserError: no captions and no classes, out holds another text or other files, or no space left.
    """
    if min(batch, part_size) < 1:
        raise UserError(f"--batch and --part-size must be at least 1; got {batch} and {part_size}")
    start = time.monotonic()
    plan = TextPlan(captions_of(place, template, names), encoder, batch, part_size)
    claim(out, plan)
    receipts = {number: receipt for number in range(plan.num_parts) if (receipt := _finished(out, number))}
    missing = [number for number in range(plan.num_parts) if number not in receipts]
    done = [sum(len(receipt.lengths) for receipt in receipts.values())]
    with FolderProgress(f"encoding the captions of {place}", len(plan.table[0]), lambda: sum(done), unit="captions"):
        for number in missing:
            receipts[number] = _make_part(out, number, plan, done)
    text = _assemble(out, plan, [receipts[number] for number in range(plan.num_parts)])
    made = sum(len(receipts[number].lengths) for number in missing)
    return PreparedText(text, plan.captioned.told, made, time.monotonic() - start)


def _make_part(out: Path, number: int, plan: TextPlan, done: list[int]) -> PartReceipt:
    captions = plan.captions_of(number)
    encoded: list[Encoded] = []
    for first in range(0, len(captions), plan.batch):
        encoded += plan.encoder.encode(captions[first : first + plan.batch])
        done.append(min(plan.batch, len(captions) - first))
    tokens_path, pooled_path = (out / name for name in part_names(number))
    try:
        _write_array(tokens_path, np.concatenate([each.tokens for each in encoded]))
        _write_array(pooled_path, np.stack([each.pooled for each in encoded]))
        receipt = _receipt(encoded, digest(tokens_path), digest(pooled_path), plan.encoder.record.tokens)
        write_whole(_receipt_path(out, number), receipt.model_dump_json().encode())
    except OSError as error:
        raise space_error(error, out) from None
    return receipt


def _receipt(encoded: Sequence[Encoded], tokens_xxh3: str, pooled_xxh3: str, most: int) -> PartReceipt:
    lengths = [len(each.tokens) for each in encoded]
    wide = (each.tokens.astype(np.float64) for each in encoded)
    total, squares = (sum(sums) for sums in zip(*((each.sum(0), (each**2).sum(0)) for each in wide), strict=True))
    return PartReceipt(
        part=Part(captions=len(encoded), tokens=sum(lengths), tokens_xxh3=tokens_xxh3, pooled_xxh3=pooled_xxh3),
        lengths=lengths,
        cut=sum(each.uncut > most for each in encoded),
        longest=max(each.uncut for each in encoded),
        total=total.tolist(),  # type: ignore[union-attr]
        squares=squares.tolist(),  # type: ignore[union-attr]
    )


def _finished(out: Path, number: int) -> PartReceipt | None:
    """The receipt of a part that is whole, verified by its digests; otherwise None."""
    try:
        receipt = PartReceipt.model_validate_json(_receipt_path(out, number).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    wanted = (receipt.part.tokens_xxh3, receipt.part.pooled_xxh3)
    paths = [out / name for name in part_names(number)]
    whole_ones = all(path.is_file() and digest(path) == xxh3 for path, xxh3 in zip(paths, wanted, strict=True))
    return receipt if whole_ones else None


def _assemble(out: Path, plan: TextPlan, receipts: list[PartReceipt]) -> TextIndex:
    """Writes the columns, the captions and, last of all, text.json: only with it does the folder count as a text."""
    captions, rows = plan.table
    first = np.cumsum([0, *(length for receipt in receipts for length in receipt.lengths)])
    without = np.flatnonzero(rows == 0)
    try:
        _write_array(out / ROWS_FILE, rows)
        _write_array(out / FIRST_FILE, first)
        write_whole(out / CAPTIONS_FILE, "".join(f"{json.dumps(caption)}\n" for caption in captions).encode())
        write_whole(out / UNCAPTIONED_FILE, "".join(f"{sample_id}\n" for sample_id in without.tolist()).encode())
        mean, std = _spread(receipts)
        text = TextIndex(
            format=FORMAT,
            encoder=plan.encoder.record,
            samples=len(rows),
            digests_xxh3=plan.captioned.digests_xxh3,
            made_of=plan.captioned.made_of,
            captions=len(captions),
            without=len(without),
            cut=sum(receipt.cut for receipt in receipts),
            longest=max(receipt.longest for receipt in receipts),
            rows_xxh3=digest(out / ROWS_FILE),
            first_xxh3=digest(out / FIRST_FILE),
            captions_xxh3=digest(out / CAPTIONS_FILE),
            head=tuple(captions[1 : HEAD + 1]),
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            parts=tuple(receipt.part for receipt in receipts),
        )
        write_whole(out / TEXT_FILE, text.model_dump_json(indent=1).encode())
    except OSError as error:
        raise space_error(error, out) from None
    for left in out.rglob(f"*{TEMPORARY}"):  # of a run that was killed
        left.unlink(missing_ok=True)
    return text


def _spread(receipts: list[PartReceipt]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, over the tokens of all captions: float64 [E]."""
    count = sum(receipt.part.tokens for receipt in receipts)
    mean = np.sum([receipt.total for receipt in receipts], axis=0) / count
    squares = np.sum([receipt.squares for receipt in receipts], axis=0) / count
    return mean, np.sqrt(np.maximum(squares - mean**2, 0))


def _write_array(path: Path, array: np.ndarray) -> None:
    """An npy file that is seen whole or not at all. (ndarray.tofile, which np.save uses, tells a full disk without its errno.)"""
    array = np.ascontiguousarray(array)
    with whole(path) as draft, draft.open("wb") as file:
        described = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, described)
        file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def _receipt_path(out: Path, number: int) -> Path:
    return out / RECEIPTS / f"part-{number:05d}.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `fasttrain prepare text`."""
    parser.add_argument("set", help="folder of a prepared set, or WebDataset shards (FOLDER/{00000..00127}.tar)")
    parser.add_argument("--encoder", required=True, help="folder of a CLIP text encoder, or a hub id (then with --encoder-revision)")
    parser.add_argument("--encoder-revision", help="commit hash of a hub id")
    parser.add_argument(
        "--template", help=f"make the captions of class names, which stand for {{}} (where a set has no captions: {DEFAULT_TEMPLATE!r})"
    )
    parser.add_argument("--class-names", type=Path, help="file of lines `folder words`: what the classes are called")
    parser.add_argument("--out", type=Path, help="folder to write to (text/ in the set's own)")
    parser.add_argument("--batch", type=int, default=64, help="captions encoded at once (%(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, help="places of a caption, both marks included; longer ones are cut (all that the encoder has)"
    )
    parser.add_argument("--part-size", type=int, default=4096, help="captions a file at most (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Carries out `fasttrain prepare text`."""
    if args.out is None and pattern_of(args.set) is not None:
        raise UserError(f"{args.set}: give --out FOLDER: shards made elsewhere are left as they are")
    out = args.out or Path(args.set) / OWN_FOLDER
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = TextEncoder.load(args.encoder, args.encoder_revision, args.max_tokens, device)
    print(prepare_text(args.set, out, encoder, args.template, args.class_names, args.batch, args.part_size).summary(out))
