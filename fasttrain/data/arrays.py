"""Prepared shards read in place: memory-mapped tars, rows of a strided view, digests compared at first touch.

A shard that is not what was prepared is looked at row by row: rows whose own digest agrees are good, the others are damage. Labels come
from labels.npy, so none ever stands on another sample. What may pass (EIO, a stale handle) is tried again and then stops the run; it is
never taken for damage. A file cut short while it is mapped ends the process with SIGBUS: the watchdog names it, and at the next start the
shard is damage like any other.
"""

import errno
import io
import mmap
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash

from fasttrain.data.damage import Damage
from fasttrain.data.files import LocalFiles, ShardFiles
from fasttrain.data.holding import Holding
from fasttrain.data.index import INDEX_FILE, NPY_HEADER, Index, Shard
from fasttrain.data.remote.retry import PassingError, Patience
from fasttrain.errors import UserError

T = TypeVar("T")
REMEDY = "restore the file, or run the same `fasttrain prepare` command again: it makes only what is missing or damaged"


class _Opened(NamedTuple):
    """A shard's rows, and which of them are good; None: all."""

    view: np.ndarray
    good: np.ndarray | None


class ArrayReader:
    """Rows of prepared shards, in any number of threads.

    Args:
        files: where they are.
        index: of the set.
        digests: uint64 [samples] of the arrays.
        verify: compare each shard's digest when it is first touched.
        retry_seconds: how long a passing failure is tried again.
        damage: where what is unreadable is noted.
    """

    def __init__(self, files: ShardFiles, index: Index, digests: np.ndarray, verify: bool, retry_seconds: float, damage: Damage):
        self._files, self._index, self._digests, self._verify = files, index, digests, verify
        self._retry_seconds, self._damage = retry_seconds, damage
        self._first = np.concatenate([[0], np.cumsum(index.shard_samples)])
        self._held = Holding(files, [shard.file for shard in index.shards], [shard.bytes for shard in index.shards], self._open)

    def read(self, number: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of a shard, [n, *shape] in new memory, and which of them could be read: None means all."""
        with self._held.use(number) as opened:
            if opened.good is None:
                # view[rows], never np.take: take copies the whole strided view first.
                return opened.view[rows], None
            good = opened.good[rows]
            arrays = np.zeros((len(rows), *self._index.shape), self._index.dtype)
            arrays[good] = opened.view[rows[good]]
            return arrays, good

    def look(self) -> None:
        """Looks at once at the shards here that are missing or of another size. Raises UserError where they are too many."""
        if isinstance(self._files, LocalFiles):
            for number, shard in enumerate(self._index.shards):
                path = self._files.folder / shard.file
                if not path.is_file() or path.stat().st_size != shard.bytes:
                    with self._held.use(number):
                        pass

    def _open(self, number: int) -> _Opened:
        shard = self._index.shards[number]
        return retried(f"{self._files.place}/{shard.file}", self._retry_seconds, lambda: self._opened(number, shard))

    def _opened(self, number: int, shard: Shard) -> _Opened:
        while True:
            try:
                path = self._files.path(shard.file)
            except FileNotFoundError:
                self._check_set_is_there()
                return self._rescued(number, shard, None, "missing")
            why = self._fault(path, shard)
            if why is None:
                return _Opened(array_view(path, shard, self._index.shape, self._index.dtype), None)
            if not self._files.renew(shard.file):
                return self._rescued(number, shard, path, why)

    def _check_set_is_there(self) -> None:
        """A shard alone may be missing; a folder that is gone with all it held has lost its disk, and that may pass."""
        try:
            self._files.path(INDEX_FILE)
        except FileNotFoundError:
            raise OSError(errno.ESTALE, "the whole set is gone; is its disk still mounted?") from None

    def _fault(self, path: Path, shard: Shard) -> str | None:
        """What of this file is not as it was prepared."""
        size = path.stat().st_size
        if size != shard.bytes:
            return f"{'cut short' if size < shard.bytes else 'longer than it was'}: {size} of {shard.bytes} bytes"
        if self._verify and mapped_digest(path) != shard.xxh3:
            return "its content is not what was prepared"
        if shard.samples and not self._verify and not _has_header(path, shard, self._index):
            return "no array where the index says"
        if shard.samples and self._verify and not _has_header(path, shard, self._index):
            told = f"{self._index.dtype} {list(self._index.shape)} where the index says"
            raise UserError(f"{path}: holds no {told}: the index is of another set; {REMEDY}")
        return None

    def _rescued(self, number: int, shard: Shard, path: Path | None, why: str) -> _Opened:
        """What still verifies of a damaged shard."""
        rows = slice(self._first[number], self._first[number + 1])
        view = _rows_inside(path, shard, self._index.shape, self._index.dtype)
        good = np.zeros(shard.samples, bool)
        good[: len(view)] = [
            xxhash.xxh3_64_intdigest(row) == wanted for row, wanted in zip(view, self._digests[rows].tolist(), strict=False)
        ]
        self._damage.found(shard.file, np.flatnonzero(~good).tolist(), shard.samples, why)
        return _Opened(view, good)


def retried(what: str, seconds: float, attempt: Callable[[], T]) -> T:
    """What `attempt` gives, tried again while the system fails in a way that may pass.

    Raises:
        UserError: it did not pass within `seconds`.
    """
    patience = Patience(what, seconds, threading.Event())
    for _ in count():
        try:
            return attempt()
        except OSError as error:
            patience.wait(PassingError(error.strerror or type(error).__name__))
    raise AssertionError


def array_view(path: Path, shard: Shard, shape: Sequence[int], dtype: str, samples: int | None = None) -> np.ndarray:
    """A shard's first samples (all by default) as one read-only array [samples, *shape] over the mapped file; nothing is read yet."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    inner = np.empty(shape, dtype).strides
    return np.ndarray((shard.samples if samples is None else samples, *shape), dtype, mapped, shard.offset, (shard.stride, *inner))


def mapped_digest(path: Path) -> str:
    """xxh3 of a file through a mapping: the pages it warms are the ones that the samples are then read from."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return xxhash.xxh3_128(mapped).hexdigest()


def _rows_inside(path: Path | None, shard: Shard, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The rows that lie wholly inside what there is of a file."""
    sample_bytes = np.empty(shape, dtype).nbytes
    room = (path.stat().st_size if path else 0) - shard.offset - sample_bytes
    inside = min(shard.samples, room // shard.stride + 1) if shard.samples and room >= 0 else 0
    if path is None or not inside:
        return np.empty((0, *shape), dtype)
    return array_view(path, shard, shape, dtype, inside)


def _has_header(path: Path, shard: Shard, index: Index) -> bool:
    """The first sample's own npy header must agree with the index: an index of another set would give plausible noise."""
    with path.open("rb") as file:
        file.seek(shard.offset - NPY_HEADER)
        return file.read(NPY_HEADER) == npy_header(index.shape, index.dtype)


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """As numpy writes it. Compared, not parsed: parsing uses Python's own parser, which two threads at once can crash in Python 3.11."""
    file = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()
