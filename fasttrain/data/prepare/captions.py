"""The captions that come with a source's images: read beside them, kept in their order, and those that lack one listed."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.data.prepare.pixels import Unreadable
from fasttrain.data.prepare.plan import Plan
from fasttrain.data.prepare.source import Entry, read_place
from fasttrain.data.prepare.writer import Rejection, read_receipt, write_whole
from fasttrain.data.text.captions import KINDS, Kind, NoCaption, caption_in
from fasttrain.errors import UserError

UNCAPTIONED_FILE = "uncaptioned.jsonl"


@dataclass(frozen=True)
class Wanted:
    """Captions to be kept: the ending of their files, and whether an image without one is left out."""

    kind: Kind
    required: bool = False

    def settings(self) -> Mapping[str, Any]:
        """What a plan says of them."""
        return {"caption_files": self.kind, "require_captions": self.required}


@dataclass(frozen=True)
class Captions:
    """Reads the captions of a listing's entries; path: of the listing."""

    path: Path
    required: bool

    def read(self, entry: Entry) -> str | None:
        """The caption; None where there is none and none is required.

        Raises:
            Unreadable: a caption is required, and there is none.
        """
        try:
            return self._read(entry)
        except NoCaption as reason:
            if self.required:
                raise Unreadable(f"no caption: {reason}") from None
            return None

    def why_none(self, entry: Entry) -> str:
        """Why an entry has no caption."""
        try:
            self._read(entry)
        except NoCaption as reason:
            return str(reason)
        return "it had none when the set was made"

    def _read(self, entry: Entry) -> str:
        if entry.caption is None:
            raise NoCaption("no file with a caption beside it")
        try:
            return caption_in(read_place(self.path, entry.caption), entry.caption_kind)
        except Unreadable as reason:
            raise NoCaption(str(reason)) from None


def list_uncaptioned(out: Path, plan: Plan[Entry], captions: Captions) -> int:
    """Writes `uncaptioned.jsonl`, file and reason of each sample of a finished set without a caption; returns how many."""
    lines = [Rejection(file=entry.name, reason=captions.why_none(entry)) for entry in _without(out, plan)]
    path = out / UNCAPTIONED_FILE
    if lines:
        write_whole(path, "".join(f"{line.model_dump_json()}\n" for line in lines).encode())
    else:
        path.unlink(missing_ok=True)
    return len(lines)


def _without(out: Path, plan: Plan[Entry]) -> Iterator[Entry]:
    for number in range(plan.num_shards):
        receipt = read_receipt(out, number)
        assert receipt is not None  # the set is finished
        rejected = {rejection.file for rejection in receipt.rejected}
        accepted = [entry for entry in plan.entries_of(number) if entry.name not in rejected]
        yield from (entry for entry, caption in zip(accepted, receipt.captions, strict=True) if caption is None)


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which captions are kept."""
    told = "keep the caption of each image, from the file of this ending beside it (of WebDataset shards, from their txt or else json)"
    parser.add_argument("--captions", choices=KINDS, help=told)
    parser.add_argument("--require-captions", action="store_true", help="leave out images without a caption (default: the empty caption)")


def captions_wanted(args: argparse.Namespace) -> Wanted | None:
    """What the arguments ask for. Raises UserError."""
    if args.captions is None:
        if args.require_captions:
            raise UserError("--require-captions goes with --captions txt or json, which says where the captions are")
        return None
    return Wanted(args.captions, args.require_captions)
