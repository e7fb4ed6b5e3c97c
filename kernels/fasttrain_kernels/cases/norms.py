"""Cases of the operations that normalise tokens."""

import torch

from fasttrain_kernels.adaln import adaln, adaln_reference
from fasttrain_kernels.cases.case import Case, Inputs, Shape, randn
from fasttrain_kernels.gated_adaln import gated_adaln, gated_adaln_reference
from fasttrain_kernels.residual_norm import residual_norm, residual_norm_reference

_SHAPES = ((5, 3, 384), (2, 4, 768), (1, 3, 1152), (9, 3, 33), (1, 1, 1), (2, 17, 100), (0, 3, 8), (2, 0, 8))
_REAL = ((256, 768), (256, 1024), (256, 1152), (256, 1536))
_SMALLEST = ((1, 1, 1), (2, 1, 33))
_NORMS = ({"norm": "layer"}, {"norm": "rms"})


def adaln_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x of `shape` [B, T, D] with a mean far from 0; scale and shift [B, D]."""
    rows = (shape[0], shape[-1])
    x = randn(shape, torch.float32, device, 0) * 2 + 3
    return {"x": x.to(dtype), "scale": randn(rows, dtype, device, 1), "shift": randn(rows, dtype, device, 2)}


def gated_adaln_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Those of adaln, a branch like x and a gate like scale."""
    x, scale, shift = adaln_inputs(shape, dtype, device).values()
    gate = randn((shape[0], shape[-1]), dtype, device, 4)
    return {"x": x, "branch": randn(shape, dtype, device, 3), "gate": gate, "scale": scale, "shift": shift}


def residual_norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x of `shape` [..., D] with a mean far from 0, a branch like it, and learned rows [D]."""
    x = randn(shape, torch.float32, device, 0) * 2 + 3
    rows = {"weight": 1 + randn(shape[-1:], dtype, device, 1), "bias": randn(shape[-1:], dtype, device, 2)}
    return {"x": x.to(dtype), "branch": randn(shape, dtype, device, 3), **rows}


NORM_CASES = {
    "adaln": Case(
        reference=adaln_reference,
        call=adaln,
        inputs=adaln_inputs,
        differentiable=("x", "scale", "shift"),
        shapes=_SHAPES,
        sample=(6, 1152),
        real=_REAL,
        minimum=(4, 6),
        smallest=_SMALLEST,
        options=_NORMS,
    ),
    "gated_adaln": Case(
        reference=gated_adaln_reference,
        call=gated_adaln,
        inputs=gated_adaln_inputs,
        differentiable=("x", "branch", "gate", "scale", "shift"),
        shapes=_SHAPES,
        sample=(6, 1152),
        real=_REAL,
        minimum=(8, 12),
        smallest=_SMALLEST,
        options=_NORMS,
    ),
    "residual_norm": Case(
        reference=residual_norm_reference,
        call=residual_norm,
        inputs=residual_norm_inputs,
        differentiable=("x", "branch", "weight", "bias"),
        shapes=_SHAPES,
        sample=(6, 1152),
        real=_REAL,
        minimum=(8, 8),
        smallest=_SMALLEST,
        options=_NORMS,
    ),
}
