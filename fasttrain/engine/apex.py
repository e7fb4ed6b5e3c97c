"""NVIDIA's apex, of which only its fused Adam is used: where it is installed with its CUDA extensions."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from fasttrain.engine.update import Borrowed
from fasttrain.errors import UserError

_REMEDY = (
    "it comes from https://github.com/NVIDIA/apex, built with --cpp_ext --cuda_ext, or in NGC containers (PyPI's `apex` is another "
    "package); or use optimizer.implementation: fasttrain"
)


def apex_adam(device: torch.device) -> Borrowed:
    """apex.optimizers.FusedAdam as AdamW.

    Raises:
        UserError: NVIDIA's apex is not installed with its CUDA extensions, or the tensors are not on a GPU.
    """
    if device.type != "cuda":
        raise UserError(
            f"optimizer.implementation: apex needs a GPU, and the optimizer's state is on {device.type}; use fasttrain or torch"
        )
    if importlib.util.find_spec("amp_C") is None:
        raise UserError(f"optimizer.implementation: NVIDIA's apex is not installed with its CUDA extensions; {_REMEDY}")
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(f"optimizer.implementation: apex has no FusedAdam ({error}); {_REMEDY}") from None

    def make(params: list[Tensor]) -> Any:
        return FusedAdam(params, adam_w_mode=True)

    return Borrowed(make, "apex FusedAdam")
