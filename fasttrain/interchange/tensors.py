"""Tensors of a source by name, read one at a time: a network is never held twice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fasttrain.errors import UserError

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Tensors:
    """Named tensors that are read when they are asked for.

    Attributes:
        shapes: of each name.
        read: a name's tensor, fp32 on the CPU.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def of_files(paths: Sequence[Path]) -> Tensors:
    """The tensors in safetensors files, each in one of them.

    Raises:
        UserError: a file is absent, damaged or none, or holds what no weights are.
    """
    files = {path: _opened(path) for path in paths}
    place = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    shapes = {}
    for name, path in place.items():
        piece = files[path].get_slice(name)
        if piece.get_dtype() not in _FLOATS:
            told = f"init_from: {path} holds {name} as {piece.get_dtype()}, which no weights are"
            raise UserError(f"{told}: give a file of floating-point tensors only")
        shapes[name] = tuple(piece.get_shape())
    return Tensors(shapes, lambda name: files[place[name]].get_tensor(name).float())


def of_mapping(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are in memory."""
    return Tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda name: tensors[name].detach().float())


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header. Raises UserError as `of_files`."""
    return _opened(path).metadata() or {}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"init_from: {path} is missing: fetch it again") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"init_from: {path} is no sound safetensors file ({error}): fetch or export it again") from None
