"""Tensors in one safetensors file that appears whole or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fasttrain.files import whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors from any device, and what is told of them.

    Raises:
        OSError: no room, or no right to write there.
    """
    try:
        with whole(path) as draft:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, draft, dict(metadata))
    except SafetensorError as error:  # how safetensors tells of a full disk: "I/O error: No space left on device (os error 28)"
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else OSError(0, str(error))) from None
