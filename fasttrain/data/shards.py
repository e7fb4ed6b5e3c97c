"""Shards read in place: memory-mapped tars, whole batches gathered by indexing a strided view, digests checked at first touch."""

import mmap
import threading
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from fasttrain.data.index import LABELS_FILE, NPY_HEADER, Index, Shard, read_index
from fasttrain.errors import UserError
from fasttrain.files import digest

_REMEDY = "restore the file, or run the same `fasttrain prepare` command again: it makes only what is missing or damaged"


def array_view(path: Path, shard: Shard, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A shard's samples as one read-only array [samples, *shape] over the mapped file; nothing is read yet."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if shard.samples:
            file.seek(shard.offset - NPY_HEADER)
            _check_header(path, file, shape, dtype)
    inner = np.empty(shape, dtype).strides
    return np.ndarray((shard.samples, *shape), dtype, mapped, shard.offset, (shard.stride, *inner))


def mapped_digest(path: Path) -> str:
    """xxh3 of a file through a mapping: the pages it warms are the ones that the samples are then read from."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return xxhash.xxh3_128(mapped).hexdigest()


def _check_header(path: Path, file: BinaryIO, shape: tuple[int, ...], dtype: str) -> None:
    """The first sample's own npy header must agree with the index: an index of another set would give plausible noise."""
    try:
        np.lib.format.read_magic(file)
        found = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        raise UserError(f"{path}: no array where the index says; {_REMEDY}") from None
    if found != (shape, False, np.dtype(dtype)):
        raise UserError(f"{path}: holds {found[2]} {list(found[0])} where the index says {dtype} {list(shape)}; {_REMEDY}")


class ShardSet:
    """A folder of shards, addressed by sample_id: 0 .. samples - 1, shard after shard.

    Shards are mapped, and their digests compared, when first touched. Any number of threads may gather at once.
    """

    def __init__(self, folder: Path, index: Index, labels: np.ndarray, verify: bool = True):
        self.folder = folder
        self.index = index
        self.labels = labels
        self._verify = verify
        self._first = np.concatenate([[0], np.cumsum(index.shard_samples)])
        self._views: list[np.ndarray | None] = [None] * len(index.shards)
        self._locks = [threading.Lock() for _ in index.shards]

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "ShardSet":
        """The set of shards in a folder.

        Args:
            path: the folder that `fasttrain prepare` wrote.
            verify: compare each shard's digest when it is first touched; sizes and the labels' digest are compared here in any case.

        Raises:
            UserError: missing folder, index, shard or labels; another format; a file of another size than the index says.
        """
        folder = Path(path)
        index = read_index(folder)
        for shard in index.shards:
            _check_size(folder / shard.file, shard.bytes)
        return cls(folder, index, _read_labels(folder, index), verify)

    def __len__(self) -> int:
        return self.index.samples

    def gather(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples of these ids, in their order.

        Args:
            sample_ids: int64 [n], in [0, samples).

        Returns:
            Array [n, *shape] of the stored dtype, and labels int64 [n]: both new memory.

        Raises:
            IndexError: an id outside the set.
            UserError: a shard that is gone, or whose digest is not the index's.
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.index.samples):
            raise IndexError(f"sample ids must lie in [0, {self.index.samples}); got {ids.min()} to {ids.max()}")
        out = np.empty((len(ids), *self.index.shape), self.index.dtype)
        number = np.searchsorted(self._first, ids, side="right") - 1
        rows = ids - self._first[number]
        by_shard = np.argsort(number, kind="stable")
        starts = np.flatnonzero(np.diff(number[by_shard], prepend=-1))
        for start, stop in pairwise([*starts, len(ids)]):
            places = by_shard[start:stop]
            # view[rows], never np.take: take copies the whole strided view first.
            out[places] = self._view(int(number[places[0]]))[rows[places]]
        return out, self.labels[ids]

    def _view(self, number: int) -> np.ndarray:
        view = self._views[number]
        if view is None:
            with self._locks[number]:
                view = self._views[number]
                if view is None:
                    view = self._views[number] = self._open_shard(self.index.shards[number])
        return view

    def _open_shard(self, shard: Shard) -> np.ndarray:
        path = self.folder / shard.file
        _check_size(path, shard.bytes)
        if self._verify and mapped_digest(path) != shard.xxh3:
            raise UserError(f"{path}: its content is not what was prepared (xxh3 differs); {_REMEDY}")
        return array_view(path, shard, self.index.shape, self.index.dtype)


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise UserError(f"{path}: this shard is missing; {_REMEDY}")
    found = path.stat().st_size
    if found != size:
        cut = "cut short" if found < size else "longer than it was"
        raise UserError(f"{path}: {found} bytes where the index says {size}: the tar is {cut}; {_REMEDY}")


def _read_labels(folder: Path, index: Index) -> np.ndarray:
    path = folder / LABELS_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing; {_REMEDY}")
    if digest(path) != index.labels_xxh3:
        raise UserError(f"{path}: its content is not what was prepared (xxh3 differs); {_REMEDY}")
    labels = np.load(path, allow_pickle=False)
    if labels.dtype != np.int64 or labels.shape != (index.samples,):
        raise UserError(f"{path}: holds {labels.dtype} {labels.shape} where the index says {index.samples} labels; {_REMEDY}")
    return labels
