"""The index of one shard made elsewhere: a file of numpy arrays, made once and kept in the cache folder.

samples   int64 [n, 11]: offset and size of the image, whether it is an array, label, offset and size of the text (bytes), height and width,
          whether the text is a json, offset and size of what the label was looked for in
digests   uint64 [n, 3], xxh3 of each image, label and text
told      uint8: JSON of what was lost, refused and not used
"""

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from fasttrain.data.foreign.samples import Found, Sample, find_samples
from fasttrain.files import write_whole

_COLUMNS, _DIGESTS = 11, 3


class Part(NamedTuple):
    """One shard: its bytes, its samples [n, 11] and their digests [n, 3], the lost ones by reason, and what else was met in it."""

    bytes: int
    samples: np.ndarray
    digests: np.ndarray
    lost: Counter[str]
    faults: list[str]
    refused: Counter[str]
    unused: Counter[str]
    labelled: bool

    @property
    def xxh3(self) -> str:
        """Digest of what is used of the shard: images and labels."""
        hasher = xxhash.xxh3_128(np.ascontiguousarray(self.samples[:, 3]).tobytes())
        hasher.update(self.image_digests.tobytes())
        return hasher.hexdigest()

    @property
    def image_digests(self) -> np.ndarray:
        """uint64 [n]."""
        return self.digests[:, 0]

    def rows(self) -> Iterator[Sample]:
        """Its samples by the names of their columns."""
        for row, digests in zip(self.samples.tolist(), self.digests.tolist(), strict=True):
            yield Sample(*row, *digests)

    def without_unlabelled(self, reason: str) -> "Part":
        """Leaves out the samples that have no label."""
        kept = self.samples[:, 3] >= 0
        lost = self.lost + Counter({reason: int((~kept).sum())})
        return self._replace(samples=self.samples[kept], digests=self.digests[kept], lost=lost)


def make_part(path: Path) -> Part:
    """Reads a shard through. Raises OSError where the disk fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _part(os.fstat(descriptor).st_size, find_samples(descriptor))
    finally:
        os.close(descriptor)


def _part(size: int, found: Found) -> Part:
    rows = [sample[:_COLUMNS] for sample in found.samples]
    return Part(
        size,
        np.array(rows, np.int64).reshape(-1, _COLUMNS),
        np.array([sample[_COLUMNS:] for sample in found.samples], np.uint64).reshape(-1, _DIGESTS),
        found.lost,
        found.faults,
        found.refused,
        found.unused,
        found.labelled,
    )


def write_part(path: Path, part: Part) -> None:
    """Writes it so that it is seen whole or not at all."""
    told = part._asdict()
    arrays = {name: told.pop(name) for name in ("samples", "digests")}
    buffer = io.BytesIO()
    np.savez(buffer, told=np.frombuffer(json.dumps(told).encode(), np.uint8), **arrays)
    write_whole(path, buffer.getvalue())


def read_part(path: Path) -> Part | None:
    """A part that was written; None where there is none, or what is there is damaged (a zip checks its content)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            told = json.loads(arrays["told"].tobytes())
            return _checked(arrays["samples"], arrays["digests"], told)
    except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _checked(samples: np.ndarray, digests: np.ndarray, told: dict[str, Any]) -> Part:
    shapes = [(len(samples), _COLUMNS), (len(samples), _DIGESTS)]
    if [samples.dtype, digests.dtype] != [np.int64, np.uint64] or [samples.shape, digests.shape] != shapes:
        raise ValueError("not the arrays of a part")
    counts = {name: Counter(told[name]) for name in ("lost", "refused", "unused")}
    return Part(told["bytes"], samples, digests, faults=list(told["faults"]), labelled=bool(told["labelled"]), **counts)
