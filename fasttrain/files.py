"""Files that are whole or absent, and digests that notice accidents (they are no proof against an attacker)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

_CHUNK = 1 << 24


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside `path` to write to, renamed to it when the block ends well: readers see the old file or the new one.

    On any failure, a full disk included, the draft is removed and the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | memoryview | str) -> None:
    """Writes a file so that it is whole or as it was; text in UTF-8."""
    with whole(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """xxh3 (128 bits, hexadecimal) of a file."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        for chunk in _chunks(file):
            hasher.update(chunk)
    return hasher.hexdigest()


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk
