"""What samples are compared with: images in shards, or statistics that others computed."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError
from fasttrain.evaluation.collected import chosen
from fasttrain.evaluation.features import Images
from fasttrain.evaluation.frechet import Gaussian
from fasttrain.files import digest
from fasttrain.registry import shown

BATCH_BYTES = 1 << 26  # of images read at once


class Part(NamedTuple):
    """Some images of a reference: [n, H, W, C] uint8, whose vectors are kept [n], and how many more could not be read."""

    images: Images
    kept: NDArray[np.bool_]
    left_out: int = 0


class Reference(Protocol):
    """A reference; `kind` says what it is, `xxh3` which one, `shape` [H, W, C] of its images where it has some."""

    kind: str
    name: str
    xxh3: str
    shape: tuple[int, int, int] | None

    def gaussian(self) -> Gaussian | None:
        """Its statistics, where it states them."""

    def parts(self, rank: int, world_size: int) -> Iterator[Part]:
        """One process's share of its images."""


class Shards:
    """The images of a set of shards.

    Raises:
        UserError: the set holds latents.
    """

    kind = "images"

    def __init__(self, shards: ShardSet):
        if shards.index.kind != "image":
            told = "give a folder made by `fasttrain prepare images` at the samples' size"
            raise UserError(f"--reference {shards.files.place} holds latents; {told}")
        channels, height, width = shards.index.shape
        self.name = PurePosixPath(shards.files.place).name
        self.xxh3 = shards.index.xxh3
        self.shape: tuple[int, int, int] | None = (height, width, channels)
        self._shards = shards

    def gaussian(self) -> Gaussian | None:
        """None: it is computed from the images."""
        return None

    def parts(self, rank: int, world_size: int) -> Iterator[Part]:
        """Every `world_size`-th batch."""
        kept = chosen(len(self._shards))
        for ids in _batches(len(self._shards), math.prod(self._shards.index.shape))[rank::world_size]:
            found = self._shards.gather(ids)
            readable = found.readable
            yield Part(found.arrays[readable].transpose(0, 2, 3, 1), kept[ids][readable], int((~readable).sum()))


class StatisticsFile:
    """An npz of `mu` [D] and `sigma` [D, D], as ADM's reference batches are.

    Images `arr_0` uint8 [n, H, W, C] beside them give precision and recall. Which features made them the
    file does not say: only the length tells a wrong one.

    Raises:
        UserError: no such file, or none of these; from `parts` too, where the images are damaged.
    """

    kind = "statistics"

    def __init__(self, path: Path):
        self.name, self._path = path.name, path
        with _damage_told(path):
            self.xxh3 = digest(path)
            # Never pickled objects: allow_pickle is off by default, and stated.
            with np.load(path, allow_pickle=False) as file:
                self._mean, self._cov = (_real(key, file[key]) for key in ("mu", "sigma"))
            self._images = _image_header(path)
        self.shape = None if self._images is None else self._images[1:]
        if problem := _no_gaussian(self._mean, self._cov):
            raise UserError(f"--reference {path}: {problem}; fetch the file again, or name shards")

    def gaussian(self) -> Gaussian | None:
        """What the file states; of how many images it does not say."""
        return Gaussian(self._mean, self._cov, None)

    def parts(self, rank: int, world_size: int) -> Iterator[Part]:
        """Every `world_size`-th batch of `arr_0`, read one after another."""
        if self._images is None:
            return
        count, *shape = self._images
        kept = chosen(count)
        with _damage_told(self._path), zipfile.ZipFile(self._path) as archive, archive.open(_IMAGES) as file:
            _header(file)
            for number, ids in enumerate(_batches(count, math.prod(shape))):
                read = bytearray(file.read(len(ids) * math.prod(shape)))  # which may be written to, as torch asks of what it shares
                images = np.frombuffer(read, np.uint8).reshape(len(ids), *shape)
                if number % world_size == rank:
                    yield Part(images, kept[ids])


_IMAGES = "arr_0.npy"
_ROUNDING = 1e-6  # of the largest number, in statistics that were stored in fp32
# All that numpy and zipfile meet in a damaged file: a RuntimeError is a flag that says "encrypted", or an unknown compression.
_DAMAGE = (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise UserError(f"--reference {path}: not an npz of mu and sigma ({shown(str(error))}); name shards or ADM's statistics") from None


def _real(key: str, array: NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{key} must be real numbers, is {array.dtype}")
    return torch.from_numpy(np.asarray(array, np.float64))


def _no_gaussian(mean: Tensor, cov: Tensor) -> str | None:
    """Why these are no mean and covariance; covariances of any rank are."""
    if mean.dim() != 1 or not len(mean) or cov.shape != (len(mean),) * 2:
        return f"mu {list(mean.shape)} and sigma {list(cov.shape)} do not fit each other"
    if not all(bool(part.isfinite().all()) for part in (mean, cov)):
        return "mu and sigma must be finite"
    if bool((cov - cov.T).abs().max() > _ROUNDING * cov.abs().max()):
        return "sigma must be symmetric"
    values = torch.linalg.eigvalsh(cov)
    if bool(values[0] < -_ROUNDING * values[-1]):
        return f"sigma is no covariance: its eigenvalues, which are variances, begin at {float(values[0]):.3g}"
    return None


def _image_header(path: Path) -> tuple[int, int, int, int] | None:
    with zipfile.ZipFile(path) as archive:
        if _IMAGES not in archive.namelist():
            return None
        with archive.open(_IMAGES) as file:
            shape, in_fortran_order, dtype = _header(file)
    if dtype != np.uint8 or len(shape) != 4 or in_fortran_order or min(shape) < 1:
        raise ValueError(f"arr_0 must be uint8 images [n, H, W, C], is {dtype} {shape}")
    return shape  # type: ignore[return-value]


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _batches(count: int, sample_bytes: int) -> list[NDArray[np.int64]]:
    size = max(1, BATCH_BYTES // sample_bytes)
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
