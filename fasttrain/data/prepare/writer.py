"""One shard: written under a temporary name, flushed to the disk, renamed when whole, and vouched for by a receipt.

A receipt (`receipts/shard-00000.json`) says what its shard holds; the index is made of the receipts alone. A shard without one, or
of another size or digest, is made again: so a preparation that was killed goes on where it stopped, and mends a damaged set.
"""

import errno
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from fasttrain.data.index import NPY_HEADER, Shard
from fasttrain.data.prepare.pixels import Unreadable
from fasttrain.errors import UserError
from fasttrain.files import digest

RECEIPTS = "receipts"
TEMPORARY = ".tmp"
BLOCK = 512
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Made(NamedTuple):
    """What became of one entry of the source.

    Attributes:
        file: its name.
        sample: its array and label, or the reason why there is none.
        facts: what was recorded of it, as the plan names it.
        caption: its own, where there is one.
    """

    file: str
    sample: tuple[np.ndarray, int] | Unreadable
    facts: tuple[float, ...] = ()
    caption: str | None = None


class Rejection(BaseModel):
    """A line of rejected.jsonl."""

    file: str
    reason: str


class Receipt(BaseModel):
    """What a finished shard holds: of each sample, in order, its label, digest, facts and caption."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: Shard
    labels: list[int]
    digests: list[int]
    facts: list[tuple[float, ...]]
    captions: list[str | None]
    rejected: list[Rejection]


@dataclass
class _Noted:
    """A receipt in the making."""

    labels: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    facts: list[tuple[float, ...]] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def shard_name(number: int) -> str:
    """shard-00000.tar ..."""
    return f"shard-{number:05d}.tar"


def stride_of(array_bytes: int) -> int:
    """Bytes from one sample of a shard to the next: header and label, header and array, each padded to the tar's blocks."""
    return 3 * BLOCK + -(-(NPY_HEADER + array_bytes) // BLOCK) * BLOCK


def write_shard(out: Path, number: int, first_key: int, made: Iterable[Made]) -> Receipt:
    """Writes a shard and then its receipt; keys are the entries' numbers in the shuffled source, so they are unique in the set.

    Raises:
        UserError: no space left; nothing half-written stays.
    """
    path = out / shard_name(number)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    noted = _Noted()
    try:
        with temporary.open("wb") as file:
            _fill(file, _accepted(first_key, made, noted))
            file.flush()
            os.fsync(file.fileno())
        receipt = Receipt(shard=_describe(temporary, path.name, len(noted.labels)), **vars(noted))
        temporary.replace(path)
        write_whole(_receipt_path(out, number), receipt.model_dump_json().encode())
    except OSError as error:
        raise space_error(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)
    return receipt


def finished(out: Path, number: int) -> Receipt | None:
    """The receipt of a shard that is whole, verified by its digest; otherwise None, and a receipt that lies is removed."""
    receipt = read_receipt(out, number)
    if receipt is None:
        return None
    path = out / shard_name(number)
    if path.is_file() and path.stat().st_size == receipt.shard.bytes and digest(path) == receipt.shard.xxh3:
        return receipt
    _receipt_path(out, number).unlink(missing_ok=True)
    return None


def read_receipt(out: Path, number: int) -> Receipt | None:
    """A shard's receipt, if there is a readable one."""
    try:
        return Receipt.model_validate_json(_receipt_path(out, number).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is seen whole or not at all, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def space_error(error: OSError, path: Path) -> Exception:
    """What to tell the user when a disk is full; any other error is passed through."""
    if error.errno not in _NO_SPACE:
        return error
    return UserError(f"{path}: no space left; free some and run the same command again: the finished shards are kept")


def _accepted(first_key: int, made: Iterable[Made], noted: _Noted) -> Iterator[dict[str, str | bytes]]:
    """The readable entries as webdataset samples; all about them is noted on the way."""
    for key, (file, sample, facts, caption) in enumerate(made, first_key):
        if isinstance(sample, Unreadable):
            noted.rejected.append(Rejection(file=file, reason=str(sample)))
            continue
        array, label = sample
        array = np.ascontiguousarray(array)
        noted.labels.append(label)
        noted.digests.append(xxhash.xxh3_64_intdigest(array.data))
        noted.facts.append(facts)
        noted.captions.append(caption)
        yield {"__key__": f"{key:09d}", "cls": str(label).encode(), "npy": _npy(array)}


def _fill(file: io.BufferedWriter, samples: Iterator[dict[str, str | bytes]]) -> None:
    with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _describe(path: Path, name: str, samples: int) -> Shard:
    """A written tar's index entry, its layout read from the file itself."""
    size, found = path.stat().st_size, digest(path)
    if not samples:
        return Shard(file=name, samples=0, bytes=size, xxh3=found, offset=0, stride=0)
    with path.open("rb") as file:
        file.seek(3 * BLOCK)
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    if version != (1, 0) or offset != 3 * BLOCK + NPY_HEADER:
        raise ValueError(f"{name}: an npy header of {offset - 3 * BLOCK} bytes, not {NPY_HEADER}")
    array_bytes = int(np.prod(shape)) * dtype.itemsize
    return Shard(file=name, samples=samples, bytes=size, xxh3=found, offset=offset, stride=stride_of(array_bytes))


def _receipt_path(out: Path, number: int) -> Path:
    return out / RECEIPTS / f"shard-{number:05d}.json"
