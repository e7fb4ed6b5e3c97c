"""Which implementation of an operation runs: the Triton kernel or the torch reference, and why."""

import os

import torch
from torch import Tensor

from fasttrain_kernels.language import HAS_TRITON

IMPLEMENTATIONS = ("auto", "triton", "reference")

# Triton itself reads this variable once, when kernels are defined: reading it later would contradict what was built.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def choose(impl: str, *tensors: Tensor) -> str:
    """The implementation for these tensors, "triton" or "reference".

    `auto` takes Triton for CUDA tensors where Triton is installed, and the reference everywhere else, float64 included:
    the kernels compute in fp32.

    Raises:
        ValueError: `impl` is unknown, or "triton" was asked for where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; known: {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return "reference"
    obstacle = _obstacle(tensors, cpu_allowed=INTERPRETED and impl == "triton")
    if obstacle is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {obstacle}; use impl='auto' or impl='reference'")
    return "reference"


def here() -> str:
    """What `impl="auto"` uses on this machine, and why."""
    if not HAS_TRITON:
        return "reference (Triton is not installed)"
    if not torch.cuda.is_available():
        return "reference (no CUDA device)"
    return f"triton ({torch.cuda.get_device_name()})"


def _obstacle(tensors: tuple[Tensor, ...], cpu_allowed: bool) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    for tensor in tensors:
        if not (tensor.is_cuda or cpu_allowed):
            return f"the kernels need CUDA tensors, and one is on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "the kernels compute in fp32, and one tensor is float64"
    return None
