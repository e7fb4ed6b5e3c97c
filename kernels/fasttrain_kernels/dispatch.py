"""Which implementation of an operation runs: the Triton kernel or the torch reference, and why."""

import difflib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.language import HAS_TRITON

IMPLEMENTATIONS = ("auto", "triton", "reference")
OPERATIONS = (
    "uniform",
    "latent_noising",
    "noising",
    "weighted_mse",
    "text_padding",
    "adaln",
    "gated_adaln",
    "residual_norm",
    "qk_norm",
    "joint_qk_norm",
    "bias_gelu",
    "adamw_ema",
)
"""Every operation with a kernel, by the name of its file and of its public function."""

OLDEST = (8, 0)
"""The first compute capability of CUDA devices that the kernels are compiled and tested for: bf16 begins here."""

# Triton itself reads this variable once, when kernels are defined: reading it later would contradict what was built.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Kernels:
    """The implementation of every operation: one for all, and exceptions by operation (to measure what each is worth).

    Raises:
        ValueError: an unknown implementation or operation.
    """

    default: str = "auto"
    overrides: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for operation, impl in self.overrides.items():
            if operation not in OPERATIONS:
                close = difflib.get_close_matches(operation, OPERATIONS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(OPERATIONS)}"
                raise ValueError(f"unknown operation {operation!r}; {hint}")
            _require_known(impl)
        _require_known(self.default)

    def of(self, operation: str) -> str:
        """The `impl` to call an operation of OPERATIONS with."""
        return self.overrides.get(operation, self.default)


def choose(impl: str, *tensors: Tensor) -> str:
    """The implementation for these tensors, "triton" or "reference".

    `auto` takes Triton for CUDA tensors where Triton is installed and supports the device, and the reference everywhere else,
    float64 included: the kernels compute in fp32. A GPU that is passed over is told in one line, once.

    Raises:
        ValueError: `impl` is unknown, or "triton" was asked for where it cannot run.
    """
    _require_known(impl)
    if impl == "reference":
        return "reference"
    obstacle = _obstacle(tensors, cpu_allowed=INTERPRETED and impl == "triton")
    if obstacle is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {obstacle}; use impl='auto' or impl='reference'")
    if tensors and tensors[0].is_cuda and not torch.compiler.is_compiling():
        _tell(obstacle)
    return "reference"


def here() -> str:
    """What `impl="auto"` uses on this machine, and why."""
    if not HAS_TRITON:
        return "reference (Triton is not installed)"
    if not torch.cuda.is_available():
        return "reference (no CUDA device)"
    unsupported = _unsupported(torch.cuda.current_device())
    return f"reference ({unsupported})" if unsupported else f"triton ({torch.cuda.get_device_name()})"


def _require_known(impl: Any) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; known: {', '.join(IMPLEMENTATIONS)}")


def _obstacle(tensors: tuple[Tensor, ...], cpu_allowed: bool) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    for tensor in tensors:
        if not (tensor.is_cuda or cpu_allowed):
            return f"the kernels need CUDA tensors, and one is on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "the kernels compute in fp32, and one tensor is float64"
        if tensor.is_cuda and (unsupported := _unsupported(tensor.device)):
            return unsupported
    return None


# Dynamo would trace into a cached function: outside the cache it takes the answer as it is.
@torch.compiler.assume_constant_result
def _unsupported(device: torch.device | int) -> str | None:
    return _why_unsupported(device)


@functools.cache
def _why_unsupported(device: torch.device | int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"the kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, and {name} has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _tell(obstacle: str) -> None:
    print(f"fasttrain_kernels: torch references instead of Triton kernels: {obstacle}", flush=True)
