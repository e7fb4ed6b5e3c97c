"""Digests of files: they notice accidents (a flipped bit, a truncation); they are no proof against an attacker."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

_CHUNK = 1 << 24


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
