"""One entry per operation: its reference, its public function, and random inputs for it. Tests and benchmarks share this table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.adaln import adaln, adaln_reference
from fasttrain_kernels.noising import noising, noising_reference
from fasttrain_kernels.weighted_mse import weighted_mse, weighted_mse_reference

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How to call one operation: `call(**inputs, **options, impl=...)` beside `reference(**inputs, **options)`."""

    reference: Callable[..., Any]
    call: Callable[..., Any]
    inputs: Callable[[tuple[int, ...], torch.dtype, torch.device], Inputs]
    differentiable: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Small shapes of the first input: odd sizes, one element, several blocks, and none at all."""
    options: tuple[dict[str, Any], ...] = ({},)
    """Settings worth testing, each a set of keyword arguments."""


def _randn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    # Drawn on the CPU, so that every device sees the same inputs.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _draws(batch: int, device: torch.device) -> Inputs:
    position = torch.arange(batch, device=device) * (2**32 + 12345) + 7
    return {"seed": torch.tensor(-(2**62) + 0x1234567, device=device), "position": position}


def noising_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    """x0 of `shape` and a variance-preserving path that includes no noise at all."""
    angle = torch.linspace(0.0, 1.5, shape[0], device=device)
    return {"x0": _randn(shape, dtype, device, 0), "alpha": angle.cos(), "sigma": angle.sin(), **_draws(shape[0], device)}


def weighted_mse_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    """pred and x0 of `shape`; the first sample's target holds no noise, the others are v-targets."""
    angle = torch.linspace(0.0, 1.5, shape[0], device=device)
    return {
        "pred": _randn(shape, dtype, device, 1),
        "x0": _randn(shape, dtype, device, 0),
        "x0_coef": torch.where(angle == 0, 1.0, -angle.sin()),
        "eps_coef": torch.where(angle == 0, 0.0, angle.cos()),
        "weight": torch.linspace(0.25, 4.0, shape[0], device=device),
        **_draws(shape[0], device),
    }


def adaln_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    """x of `shape` [B, T, D] with a mean far from 0; scale and shift [B, D]."""
    rows = (shape[0], shape[-1])
    x = _randn(shape, torch.float32, device, 0) * 2 + 3
    return {"x": x.to(dtype), "scale": _randn(rows, dtype, device, 1), "shift": _randn(rows, dtype, device, 2)}


_SAMPLES = ((3, 4, 8, 8), (2, 3, 7, 5), (1, 1, 1, 1), (3, 1025), (2, 4, 32, 32), (0, 4, 8, 8))
_TOKENS = ((3, 5, 384), (2, 4, 768), (2, 3, 1152), (9, 3, 33), (1, 1, 1), (2, 17, 100), (0, 3, 8), (2, 0, 8))

CASES = {
    "noising": Case(noising_reference, noising, noising_inputs, ("x0",), _SAMPLES),
    "weighted_mse": Case(weighted_mse_reference, weighted_mse, weighted_mse_inputs, ("pred",), _SAMPLES),
    "adaln": Case(adaln_reference, adaln, adaln_inputs, ("x", "scale", "shift"), _TOKENS, ({"norm": "layer"}, {"norm": "rms"})),
}
