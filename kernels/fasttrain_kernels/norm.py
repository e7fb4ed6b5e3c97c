"""The one implementation behind every norm of tokens: LayerNorm and RMSNorm, modulated or affine, with a residual before it or not.

    x_new = x + gate branch, rounded to its type       (gate or branch may be absent)
    layer: n = (x_new - mean) rstd, rstd = 1 / sqrt(var + eps)                                                  [Ba et al. 2016]
    rms:   n = x_new rstd, rstd = 1 / sqrt(mean(x_new^2) + eps)                                       [Zhang and Sennrich 2019]
    y = n gain + shift, gain = 1 + scale or a weight

    g = dy gain;   dx = dx_new + rstd (g - mean(g) - n mean(g n)), without mean(g) for rms;   dbranch = gate dx
    dgain = sum of dy n;   dshift = sum of dy;   dgate = sum of dx branch, over the tokens that share the row

x is [groups, tokens, D]: the tokens of a group share their rows gate, gain and shift [groups, D]. AdaLN's groups are its samples; an
affine norm has one group. The statistics are those of x_new as it is stored, so that the backward pass meets the same n, and so that
adding first and normalising afterwards gives the same numbers. Kept for the backward pass: x_new, the rows, mean and rstd in fp32, and
branch if there is a gate.

The rows' gradients are summed in two passes of fixed order, without atomics: each program owns some tokens of one group and writes fp32
sums over them, [splits, groups, 2 or 3, D]; a second kernel adds the splits up (partial_sums.py). They are extra bytes: with a gate, at
T = 256, D = 1152 on 132 processors, 7.1 MB written and read again, 12.5 % of the backward pass at 32 images, 3.1 % at 128; for AdaLN
alone 21 % and 5 %, for the affine norm 15 % and 4 %.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fasttrain_kernels.norm_kernels import BACKWARD, FORWARD, GATED_BACKWARD, Tiles, norm_backward_kernel, norm_forward_kernel, settings
from fasttrain_kernels.partial_sums import sum_rows
from fasttrain_kernels.processors import processors
from fasttrain_kernels.registration import operation

NORMS = ("layer", "rms")
MAX_WIDTH = 8192
"""A row lives in one program's registers."""


def normalised(x: Tensor, norm: str, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """norm(x) * weight + bias over the last dimension in plain torch, in x's own type; what the references are made of."""
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def _cut(x: Tensor, gain: Tensor, tiles: Tiles) -> tuple[tuple[int, int], tuple[int, int], dict[str, Any]]:
    """The grid, the tokens of a group and of a program, and the compiler's settings."""
    width = x.shape[-1]
    groups = gain.numel() // width
    tokens = x.numel() // (groups * width)
    grid, share, constants = settings(width, groups, tokens, tiles, element_bytes=x.element_size(), processors=processors(x.device))
    return grid, (tokens, share), constants


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _in_place(rows: Tensor) -> tuple[Tensor, int]:
    """Rows whose columns lie side by side, and how far apart the rows are: a chunk of a wider matrix needs no copy."""
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0) if rows.dim() == 2 else 0


def _forward_outputs(x: Tensor, has_branch: bool, centred: bool) -> list[Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = [torch.empty_like(rstd)] if centred else []
    return [y, rstd, *mean, torch.empty_like(y)] if has_branch else [y, rstd, *mean]


@operation("norm", fake=lambda x, branch, gate, gain, shift, one_plus, centred, eps: _forward_outputs(x, branch is not None, centred))
def _forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, gain: Tensor, shift: Tensor | None, one_plus: bool, centred: bool, eps: float
) -> list[Tensor]:
    """y and rstd; then mean, if centred; then x_new, if there is a branch."""
    outputs = _forward_outputs(x, branch is not None, centred)
    if x.numel() > 0:
        mean = outputs[2] if centred else None
        x_new = None if branch is None else outputs[-1]
        gain, gain_stride = _in_place(gain)
        gate, gate_stride = (None, 0) if gate is None else _in_place(gate)
        shift, shift_stride = (None, 0) if shift is None else _in_place(shift)
        grid, sizes, constants = _cut(x, gain, FORWARD)
        tensors = (x.contiguous(), _contiguous(branch), gate, gain, shift, x_new, *outputs[:2], mean)
        with torch.cuda.device_of(x):
            norm_forward_kernel[grid](*tensors, *sizes, gate_stride, gain_stride, shift_stride, eps, ONE_PLUS=one_plus, **constants)
    return outputs


def _backward_shapes(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    gain: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    one_plus: bool,
    parts: int,
) -> list[Tensor]:
    return [*_gradients_of_tokens(x_new, gate is not None), _gradients_of_rows(gain, parts, gain.dtype)]


def _gradients_of_tokens(x_new: Tensor, gated: bool) -> list[Tensor]:
    dx = torch.empty(x_new.shape, dtype=x_new.dtype, device=x_new.device)
    return [dx, torch.empty_like(dx)] if gated else [dx]


def _gradients_of_rows(gain: Tensor, parts: int, dtype: torch.dtype, *splits: int) -> Tensor:
    return torch.empty((*splits, *gain.shape[:-1], parts, gain.shape[-1]), dtype=dtype, device=gain.device)


@operation("norm_backward", fake=_backward_shapes)
def _backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    gain: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    one_plus: bool,
    parts: int,
) -> list[Tensor]:
    """dx; dbranch, if there is a gate (without one it is dx); dgain, dshift and dgate, those there are, as [..., parts, D]."""
    gated = gate is not None
    dx, *dbranch = _gradients_of_tokens(x_new, gated)
    if gain.numel() == 0:
        return [dx, *dbranch, _gradients_of_rows(gain, parts, gain.dtype)]
    gain, gain_stride = _in_place(gain)
    gate, gate_stride = (None, 0) if gate is None else _in_place(gate)
    grid, sizes, constants = _cut(x_new, gain, GATED_BACKWARD if gated else BACKWARD)
    sums = _gradients_of_rows(gain, parts, torch.float32, grid[1])
    read = (dy.contiguous(), _contiguous(dx_new), x_new.contiguous(), _contiguous(branch), gate, gain, rstd, mean)
    flags = {"ONE_PLUS": one_plus, "SHIFTED": parts - gated == 2, "PARTS": parts}
    with torch.cuda.device_of(dx):
        written = (dx, dbranch[0] if gated else None, sums)
        norm_backward_kernel[grid](*read, *written, *sizes, gate_stride, gain_stride, **flags, **constants)
    return [dx, *dbranch, sum_rows(sums, gain.dtype)]


class _Norm(torch.autograd.Function):
    """y, or (x_new, y), which saves adding up the two gradients of x_new in a pass of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        gain: Tensor,
        shift: Tensor | None,
        one_plus: bool,
        centred: bool,
        eps: float,
        with_residual: bool,
    ) -> Any:
        y, rstd, *rest = _forward(x, branch, gate, gain, shift, one_plus, centred, eps)
        x_new = x if branch is None else rest[-1]
        ctx.save_for_backward(x_new, None if gate is None else branch, gate, gain, rstd, rest[0] if centred else None)
        ctx.set_materialize_grads(False)
        ctx.one_plus, ctx.has_branch, ctx.shifted = one_plus, branch is not None, shift is not None
        return (x_new, y) if with_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_new, branch, gate, gain, rstd, mean = ctx.saved_tensors
        dy = torch.zeros_like(x_new) if grads[-1] is None else grads[-1]
        dx_new = grads[0] if len(grads) == 2 else None
        parts = 1 + ctx.shifted + (gate is not None)
        dx, *dbranch, drows = _backward(dy, dx_new, x_new, branch, gate, gain, rstd, mean, ctx.one_plus, parts)
        if ctx.has_branch and gate is None:
            dbranch = [dx]
        rows = drows.unbind(-2)
        dgate, dshift = rows[-1] if gate is not None else None, rows[1] if ctx.shifted else None
        return dx, dbranch[0] if dbranch else None, dgate, rows[0], dshift, *[None] * 4


def fused(x: Tensor, gain: Tensor, shift: Tensor | None, *, one_plus: bool, norm: str, eps: float) -> Tensor:
    """y by the kernels, for checked arguments; gain and shift are [groups, D] for x [groups, tokens, D], or [D] for x of any shape."""
    return _Norm.apply(x, None, None, gain, shift, one_plus, norm == "layer", eps, False)


def fused_residual(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, gain: Tensor, shift: Tensor | None, *, one_plus: bool, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """(x_new, y) likewise, with branch like x, and gate like gain."""
    return _Norm.apply(x, branch, gate, gain, shift, one_plus, norm == "layer", eps, True)


def require_norm(norm: str) -> None:
    """Raises ValueError for a norm that does not exist."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}")


def require_fitting_width(x: Tensor) -> None:
    """Raises ValueError where a row is too wide for one program."""
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x has D = {x.shape[-1]}, the Triton kernel takes at most {MAX_WIDTH}; use impl='reference'")
