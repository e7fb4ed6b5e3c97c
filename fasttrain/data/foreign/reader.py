"""Samples of shards made elsewhere: the bytes that the index names, verified by their digest at each read, and decoded.

Only images are read here, so only images are verified. Labels were read once, into the index, and stay what they were then: none ever
stands on another image, but a shard that was labelled anew keeps its old labels in training until its index is deleted. What makes
another set of the shards (`fasttrain prepare`) reads labels and captions again, and refuses changed ones; see `unchanged`.
"""

import errno
import os
from pathlib import Path

import numpy as np
import xxhash

from fasttrain.data.arrays import retried
from fasttrain.data.damage import Damage
from fasttrain.data.files import LocalFiles, ShardFiles
from fasttrain.data.foreign.decode import decode
from fasttrain.data.foreign.parts import Part
from fasttrain.data.foreign.tar import read_at
from fasttrain.data.foreign.unchanged import size_told
from fasttrain.data.holding import Holding
from fasttrain.data.prepare.pixels import Unreadable


class MemberReader:
    """Decodes rows of shards, in any number of threads.

    Args:
        files: where they are.
        names: the shards' files.
        parts: their index.
        size: pixels a side.
        verify: compare each image's digest.
        retry_seconds: how long a passing failure is tried again.
        damage: where what is unreadable is noted.
    """

    def __init__(
        self, files: ShardFiles, names: list[str], parts: list[Part], size: int, verify: bool, retry_seconds: float, damage: Damage
    ):
        self._files, self._names, self._parts, self._damage = files, names, parts, damage
        self._size, self._verify, self._retry_seconds = size, verify, retry_seconds
        self._held = Holding(files, names, [part.bytes for part in parts], parts.__getitem__)

    def read(self, number: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of a shard as uint8 [n, 3, size, size], and which of them could be read."""
        with self._held.use(number) as part:
            contents = retried(f"{self._files.place}/{self._names[number]}", self._retry_seconds, lambda: self._contents(number, rows))
        arrays = np.zeros((len(rows), 3, self._size, self._size), np.uint8)
        good = np.ones(len(rows), bool)
        for i, (row, content) in enumerate(zip(rows.tolist(), contents, strict=True)):
            try:
                if isinstance(content, str):
                    raise Unreadable(content)
                arrays[i] = decode(content, bool(part.samples[row, 2]), self._size)
            except Unreadable as reason:
                good[i] = False
                self._damage.found(self._names[number], [row], len(part.samples), str(reason))
        return arrays, good

    def look(self) -> None:
        """Notes at once what is missing or cut off of shards that are here."""
        if not isinstance(self._files, LocalFiles):
            return
        for name, part in zip(self._names, self._parts, strict=True):
            path = self._files.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != part.bytes:
                outside = np.flatnonzero(part.samples[:, 0] + part.samples[:, 1] > (size or 0))
                self._damage.found(name, outside.tolist(), len(part.samples), size_told(size, part.bytes))

    def _contents(self, number: int, rows: np.ndarray) -> list[bytes | str]:
        """The bytes of each row's image, or why they are not what was indexed."""
        name = self._names[number]
        while True:
            try:
                path = self._files.path(name)
            except FileNotFoundError:
                self._check_set_is_there()
                return [size_told(None, 0)] * len(rows)
            contents = self._read(path, self._parts[number], rows)
            if not any(isinstance(content, str) for content in contents) or not self._files.renew(name):
                return contents

    def _read(self, path: Path, part: Part, rows: np.ndarray) -> list[bytes | str]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            contents: list[bytes | str] = []
            for row in rows.tolist():
                content = read_at(descriptor, *part.samples[row, :2].tolist())
                if len(content) < part.samples[row, 1]:
                    contents.append(size_told(size, part.bytes))
                elif self._verify and xxhash.xxh3_64_intdigest(content) != int(part.image_digests[row]):
                    contents.append("its content is not what was indexed")
                else:
                    contents.append(content)
            return contents
        finally:
            os.close(descriptor)

    def _check_set_is_there(self) -> None:
        """One shard may be missing; where none is left, a disk is gone, and that may pass."""
        if isinstance(self._files, LocalFiles) and not any((self._files.folder / name).is_file() for name in self._names):
            raise OSError(errno.ESTALE, "the whole set is gone; is its disk still mounted?")
