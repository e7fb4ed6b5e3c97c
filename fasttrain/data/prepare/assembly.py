"""A whole set: its shards made in parallel, and the index put together from their receipts.

A set is a pure function of its plan: the source's entries are shuffled by a fixed Philox permutation (so that shards mix classes), cut
into shards of equal counts to within one, and each shard is made by itself. Processes and restarts leave no trace in the bytes.
"""

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fasttrain.data.index import CAPTIONS_FILE, DIGESTS_FILE, FACTS_FILE, FORMAT, INDEX_FILE, LABELS_FILE, Index
from fasttrain.data.prepare.plan import Plan, claim
from fasttrain.data.prepare.processes import run_jobs
from fasttrain.data.prepare.progress import FolderProgress, speed
from fasttrain.data.prepare.writer import (
    TEMPORARY,
    Made,
    Receipt,
    finished,
    read_receipt,
    shard_name,
    space_error,
    write_shard,
    write_whole,
)
from fasttrain.errors import UserError
from fasttrain.files import digest

T = TypeVar("T")
Make = Callable[[Sequence[T]], Iterator[Made]]
Measure = Callable[[Path, list[Receipt]], dict[str, Any]]
REJECTED_FILE = "rejected.jsonl"
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Prepared:
    """A finished set: its index, how many entries this run went through, in how many seconds, and how many samples lack a caption."""

    index: Index
    made: int
    seconds: float
    uncaptioned: int = 0

    def summary(self, out: Path) -> str:
        """What to tell the user at the end."""
        index, notes = self.index, ""
        if index.rejected:
            notes += f"; {index.rejected:,} unreadable, listed in {REJECTED_FILE}"
        if self.uncaptioned:
            notes += f"; {self.uncaptioned:,} without a caption, which get the empty one, listed in uncaptioned.jsonl"
        done = f" ({speed(self.made / self.seconds)})" if self.made else " (nothing left to do: all shards verified)"
        shape = "x".join(map(str, index.shape))
        return f"{out}: {index.samples:,} samples of {shape}, {index.num_classes} classes, {len(index.shards)} shards{done}{notes}"


def prepare_set(
    out: Path,
    plan: Plan[T],
    make: Make[T],
    measure: Measure | None = None,
    workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Prepared | None:
    """Makes what is missing of a set of shards, and its index.

    Args:
        out: the folder; made if need be.
        plan: what the set is.
        make: entries -> what became of each, in their order. Picklable where workers > 1.
        measure: index fields that are known only from the finished shards.
        workers: processes on this host; 1 works in the caller.
        rank, world_size: of a launcher; a rank makes the shards n with n % world_size == rank, and rank 0 waits for all.

    Returns:
        The finished set on rank 0, None on the others.

    Raises:
        UserError: out holds another set or other files; no space left; not one readable entry.
    """
    start = time.monotonic()
    claim(out, plan)
    missing = [n for n in range(rank, plan.num_shards, world_size) if finished(out, n) is None]
    entries = sum(len(plan.chunk(n)) for n in missing)
    _check_space(out, entries * plan.stride)
    progress = FolderProgress(f"preparing {out.name}", len(plan.entries), lambda: _written(out, plan))
    with progress if rank == 0 else nullcontext():
        jobs = [(out, n, plan.chunk(n).start, plan.entries_of(n), make) for n in missing]
        for _ in run_jobs(_make_shard, jobs, workers):
            pass
        if rank:
            return None
        receipts = _all_receipts(out, plan)
    index = _assemble(out, plan, receipts, measure)
    return Prepared(index, entries, time.monotonic() - start)


def _make_shard(out: Path, number: int, first_key: int, entries: Sequence[T], make: Make[T]) -> None:
    write_shard(out, number, first_key, make(entries))


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"{out}: the shards still to make need {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; free some space")


def _written(out: Path, plan: Plan[T]) -> int:
    """Entries already in shards, finished or growing, by the size of the files."""
    total = 0
    for number in range(plan.num_shards):
        if (out / shard_name(number)).exists():
            total += len(plan.chunk(number))
    growing = (path for path in out.glob(f"shard-*{TEMPORARY}"))
    return min(total + sum(_size(path) // plan.stride for path in growing), len(plan.entries))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed since it was listed
        return 0


def _all_receipts(out: Path, plan: Plan[T]) -> list[Receipt]:
    """Every shard's receipt, waiting for those that other ranks are still making."""
    receipts: list[Receipt] = []
    while len(receipts) < plan.num_shards:
        receipt = read_receipt(out, len(receipts))
        if receipt is None or _size(out / receipt.shard.file) != receipt.shard.bytes:
            time.sleep(_LOOK_SECONDS)
            continue
        receipts.append(receipt)
    return receipts


def _assemble(out: Path, plan: Plan[T], receipts: list[Receipt], measure: Measure | None) -> Index:
    """Writes the columns, the rejections and, last of all, the index: only with it does the folder count as a set."""
    rejected = [rejection for receipt in receipts for rejection in receipt.rejected]
    try:
        if rejected:
            write_whole(out / REJECTED_FILE, "".join(f"{line.model_dump_json()}\n" for line in rejected).encode())
        if len(rejected) == len(plan.entries):
            raise UserError(f"{out}: not one of the {len(rejected)} files is a readable image; their reasons are in {REJECTED_FILE}")
        for name, content in _columns(plan, receipts).items():
            write_whole(out / name, content)
        index = Index(
            format=FORMAT,
            kind=plan.kind,
            samples=len(plan.entries) - len(rejected),
            rejected=len(rejected),
            shape=plan.shape,
            dtype=plan.dtype,  # type: ignore[arg-type]
            classes=plan.classes,
            num_classes=len(plan.classes),
            source=plan.source,
            labels_xxh3=digest(out / LABELS_FILE),
            digests_xxh3=digest(out / DIGESTS_FILE),
            pixels=plan.pixels or plan.shape[-1],
            facts=plan.facts,
            facts_xxh3=digest(out / FACTS_FILE) if plan.facts else None,
            captions_xxh3=digest(out / CAPTIONS_FILE) if plan.captions else None,
            vae=plan.vae,
            shards=tuple(receipt.shard for receipt in receipts),
            **(measure(out, receipts) if measure else {}),
        )
        write_whole(out / INDEX_FILE, index.model_dump_json(indent=1).encode())
    except OSError as error:
        raise space_error(error, out) from None
    for left in out.rglob(f"*{TEMPORARY}"):  # of a run that was killed
        left.unlink(missing_ok=True)
    return index


def _columns(plan: Plan[T], receipts: list[Receipt]) -> dict[str, bytes]:
    """The files that hold one thing of every sample, by name."""
    columns = {
        LABELS_FILE: _npy([label for receipt in receipts for label in receipt.labels], np.int64),
        DIGESTS_FILE: _npy([each for receipt in receipts for each in receipt.digests], np.uint64),
    }
    if plan.facts:
        columns[FACTS_FILE] = _npy([each for receipt in receipts for each in receipt.facts], np.float32)
    if plan.captions:
        columns[CAPTIONS_FILE] = "".join(f"{json.dumps(each)}\n" for receipt in receipts for each in receipt.captions).encode()
    return columns


def _npy(values: Sequence[Any], dtype: type) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype))
    return buffer.getvalue()
