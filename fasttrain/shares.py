"""One rank's share of a checkpoint: a safetensors file of 1-D fp32 slices named `parameter|state|start`, written with its digest.

`start` is an index into the flattened parameter. The file is written here piece by piece, straight from the tensors' memory, so that a
thread that writes never keeps the training thread waiting for the interpreter's lock, and so that the digest is of what was meant to
be written, not of what came back from the disk. Format (https://huggingface.co/docs/safetensors): 8 bytes of header length, a JSON
header, the data.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from fasttrain.errors import UserError
from fasttrain.files import digest

_PIECE = 1 << 24
_START = re.compile(r"[0-9]{1,18}")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Written(BaseModel):
    """What a whole file is known by: its size in bytes and its xxh3 (128 bits, hexadecimal)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bytes: int = Field(ge=0)
    xxh3: Digest


def share_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def write_share(path: Path, slices: Mapping[str, torch.Tensor]) -> Written:
    """Writes slices (1-D, fp32, on the CPU, contiguous) durably. Raises OSError."""
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for piece in _pieces(slices):
            file.write(piece)
            hasher.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return Written(bytes=size, xxh3=hasher.hexdigest())


def damage(path: Path, known: Written) -> str | None:
    """How a file differs from what is known of it."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path.name} is no plain file"
        if found.st_size != known.bytes:
            return f"{path.name} has {found.st_size} bytes instead of {known.bytes}"
        return None if digest(path) == known.xxh3 else f"{path.name} does not match its digest"
    except OSError as error:
        return f"{path.name}: {error.strerror}"


class Slices:
    """Every slice in a checkpoint's files, found by parameter and state.

    Raises:
        ValueError: a file is none of ours, or a slice in it has a name, shape or type that no slice has.
    """

    def __init__(self, folder: Path, files: list[str]):
        self._files = {name: _opened(folder / name) for name in files}
        self._index: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for name, file in self._files.items():
            for tensor in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                parameter, key, start = _parts(tensor)
                piece = file.get_slice(tensor)
                shape = piece.get_shape()
                if piece.get_dtype() != "F32" or len(shape) != 1:
                    raise ValueError(f"{name}: {tensor} is {piece.get_dtype()} {shape}, not 1-D fp32")
                self._index.setdefault((parameter, key), []).append((start, shape[0], name, tensor))

    def problem(self, shapes: Mapping[str, list[int]], states: list[str]) -> str | None:
        """Why these slices are not every element of every parameter's states, each once."""
        unknown = self._index.keys() - {(parameter, key) for parameter in shapes for key in states}
        if unknown:
            return "holds {1} of {0}, which its manifest does not name".format(*min(unknown))
        for parameter, shape in shapes.items():
            numel = math.prod(shape)
            for key in states:
                if problem := _uncovered(sorted((at, count) for at, count, _, _ in self._index.get((parameter, key), [])), numel):
                    return f"{parameter} ({key}) {problem}"
        return None

    def fill(self, view: torch.Tensor, parameter: str, key: str, start: int) -> None:
        """Copies elements [start, start + len(view)) of a parameter's state into `view`."""
        filled = 0
        for at, numel, name, tensor in self._index.get((parameter, key), []):
            low, high = max(start, at), min(start + view.numel(), at + numel)
            if low < high:
                view[low - start : high - start] = self._files[name].get_slice(tensor)[low - at : high - at].to(view.device)
                filled += high - low
        if filled != view.numel():
            raise UserError(f"the checkpoint lacks {view.numel() - filled} elements of {parameter} ({key}); use another one")


def _opened(path: Path) -> Any:
    try:
        if stat.S_ISREG(path.lstat().st_mode):
            return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    raise ValueError(f"{path.name} is no plain file")


def _pieces(slices: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in slices.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    yield len(told).to_bytes(8, "little") + told
    for tensor in slices.values():
        memory = tensor.numpy().view(np.uint8).data
        for at in range(0, len(memory), _PIECE):
            yield memory[at : at + _PIECE]


def _parts(tensor: str) -> tuple[str, str, int]:
    parts = tensor.rsplit("|", 2)
    if len(parts) != 3 or not _START.fullmatch(parts[2]):
        raise ValueError(f"{tensor!r} is no slice's name")
    return parts[0], parts[1], int(parts[2])


def _uncovered(spans: list[tuple[int, int]], numel: int) -> str | None:
    end = 0
    for at, count in spans:
        if at != end:
            return f"has elements {'twice' if at < end else 'missing'} at {min(at, end)}"
        end = at + count
    return None if end == numel else f"has {end} elements instead of {numel}"
