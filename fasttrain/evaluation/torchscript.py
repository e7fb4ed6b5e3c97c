"""Features from a TorchScript file, as FID's standard Inception file is one.

The file is a program, and it is run: torch refuses pickled Python objects in it, but TorchScript itself may read and write files. Name only
files that you trust; a score keeps the file's digests. torch calls torch.jit deprecated (2.13) and still loads such files.
"""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.evaluation.features import FEATURES, Features, Images
from fasttrain.files import digest
from fasttrain.registry import shown

BATCH = 64  # images at once
_FEATURES_WANTED = "return_features"


@dataclass(frozen=True, eq=False)
class TorchScript:
    """A TorchScript file's features.

    The convention is that of `inception-2015-12-05.pt`: images uint8 [n, 3, H, W] of any size in, which the file resizes itself, vectors
    [n, D] out. A file whose forward takes `return_features` is called with it set. Grey images are given three times.
    """

    module: Any
    told: Mapping[str, Any]
    arguments: Mapping[str, bool]
    device: torch.device

    def __call__(self, images: Images) -> NDArray[np.float64]:
        """[n, D] float64."""
        return torch.cat([self._of(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]).double().numpy()

    @torch.no_grad()
    def _of(self, images: Images) -> Tensor:
        given = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
        try:
            # TF32 would make features of a GPU differ from a CPU's in the third digit.
            with torch.backends.cudnn.flags(allow_tf32=False):
                found = self.module(given, **self.arguments)
        except (RuntimeError, NotImplementedError, torch.jit.Error) as error:
            last = (str(error).strip().splitlines() or [""])[-1]
            raise UserError(f"{self.told['file']}: fails on images {tuple(given.shape)} uint8 ({shown(last)}); {_CONVENTION}") from None
        if not isinstance(found, Tensor) or found.shape[:1] != given.shape[:1] or found.dim() != 2 or not found.is_floating_point():
            made = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{self.told['file']}: makes {made} of {len(given)} images; {_CONVENTION}")
        return found.cpu()


_CONVENTION = "it must take images uint8 [n, 3, H, W] and give a vector each, [n, D]"


@FEATURES.register("torchscript")
@dataclass(frozen=True)
class TorchScriptFile:
    """The features of a TorchScript file that follows FID's Inception file."""

    file: str

    def open(self, device: torch.device) -> Features:
        """The file's module in evaluation mode."""
        path = Path(self.file)
        try:
            sha256, xxh3 = _sha256(path), digest(path)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit.load. is deprecated", category=DeprecationWarning)
                module = torch.jit.load(path, map_location=device).eval()
            names = [argument.name for argument in module.forward.schema.arguments]
        except (OSError, RuntimeError, ValueError, AttributeError, torch.jit.Error) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{path}: not a TorchScript file ({shown(first)}); name one such as inception-2015-12-05.pt") from None
        arguments = {_FEATURES_WANTED: True} if _FEATURES_WANTED in names else {}
        told = {"name": "torchscript", "version": 1, "file": path.name, "sha256": sha256, "xxh3": xxh3, "arguments": arguments}
        return TorchScript(module, told, arguments, device)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
