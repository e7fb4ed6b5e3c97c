"""What samples are compared with: images in shards, or statistics that others computed."""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

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
        UserError: no such file, or none of these.
    """

    kind = "statistics"

    def __init__(self, path: Path):
        self.name, self._path = path.name, path
        try:
            self.xxh3 = digest(path)
            # Never pickled objects: allow_pickle is off by default, and stated.
            with np.load(path, allow_pickle=False) as file:
                self._mean, self._cov = (torch.from_numpy(np.asarray(file[key], np.float64)) for key in ("mu", "sigma"))
            self._images = _image_header(path)
        except (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"--reference {path}: not an npz of mu and sigma ({shown(str(error))}); name shards or ADM's statistics"
            ) from None
        self.shape = None if self._images is None else self._images[1:]
        if self._mean.dim() != 1 or self._cov.shape != (len(self._mean),) * 2:
            raise UserError(f"--reference {path}: mu {list(self._mean.shape)} and sigma {list(self._cov.shape)} do not fit each other")
        if not all(bool(part.isfinite().all()) for part in (self._mean, self._cov)) or not torch.allclose(self._cov, self._cov.T):
            raise UserError(f"--reference {path}: mu and sigma must be finite, and sigma symmetric; fetch the file again")

    def gaussian(self) -> Gaussian | None:
        """What the file states; of how many images it does not say."""
        return Gaussian(self._mean, self._cov, None)

    def parts(self, rank: int, world_size: int) -> Iterator[Part]:
        """Every `world_size`-th batch of `arr_0`, read one after another."""
        if self._images is None:
            return
        count, *shape = self._images
        kept = chosen(count)
        with zipfile.ZipFile(self._path) as archive, archive.open(_IMAGES) as file:
            _header(file)
            for number, ids in enumerate(_batches(count, math.prod(shape))):
                images = np.frombuffer(file.read(len(ids) * math.prod(shape)), np.uint8).reshape(len(ids), *shape)
                if number % world_size == rank:
                    yield Part(images, kept[ids])


_IMAGES = "arr_0.npy"


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
