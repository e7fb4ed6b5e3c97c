"""Adaptive layer norm: LayerNorm or RMSNorm without weights, then each sample's own scale and shift.

    layer: n = (x - mean) rstd, rstd = 1 / sqrt(var + eps)     rms: n = x rstd, rstd = 1 / sqrt(mean(x^2) + eps)
    y = n (1 + scale_b) + shift_b                                                [Peebles and Xie 2023, section 3.2]

    g = dy (1 + scale_b);   dx = rstd (g - mean(g) - n mean(g n)), without mean(g) for rms
    dscale_b = sum over tokens of dy n;   dshift_b = sum over tokens of dy

x, y are [B, T, D]; scale, shift [B, D], rows of a wider matrix allowed; fp32, bf16 or fp16, computed in fp32. Bytes per element in
bf16: forward 2 read, 2 written; backward 4 read, 2 written. Kept for the backward pass: x, scale and the statistics (mean, rstd) in
fp32. dscale and dshift are summed in two passes of fixed order, without atomics: each program owns some tokens of one sample and writes
fp32 sums over them, [B, splits, 2, D]; a second kernel adds the splits up.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain_kernels.arguments import require_float, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton

NORMS = ("layer", "rms")
MAX_WIDTH = 8192
"""A row lives in one program's registers."""

_PROGRAMS_PER_PROCESSOR = 8
_SUM_BLOCK = 128


def adaln_reference(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6) -> Tensor:
    """norm(x) * (1 + scale) + shift in plain torch, computed in fp32 (float64 for float64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normalise = F.layer_norm if norm == "layer" else F.rms_norm
    normed = normalise(x.to(wide), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(x.dtype)


@jit
def _first_and_last_token(tokens):
    share = tl.cdiv(tokens, tl.num_programs(1))
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, tokens)


@jit
def _adaln_forward_kernel(
    x,  # [B, tokens, width] any float
    scale,  # [B, width] any float, rows scale_stride apart
    shift,  # [B, width] any float, rows shift_stride apart
    y,  # [B, tokens, width] x's type
    mean,  # [B, tokens] fp32, unused for rms
    rstd,  # [B, tokens] fp32
    tokens,
    width,
    scale_stride,
    shift_stride,
    eps,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = 1.0 + tl.load(scale + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + sample * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    first, last = _first_and_last_token(tokens)
    for token in range(first, last):
        row = sample * tokens + token
        value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            centre = tl.sum(value, axis=0) / width
            tl.store(mean + row, centre)
            value = tl.where(inside, value - centre, 0.0)
        spread = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        tl.store(rstd + row, spread)
        tl.store(y + row * width + column, value * spread * gain + offset, mask=inside)


@jit
def _adaln_backward_kernel(
    dy,  # [B, tokens, width] x's type
    x,  # [B, tokens, width] any float
    scale,  # [B, width] any float, rows scale_stride apart
    mean,  # [B, tokens] fp32, unused for rms
    rstd,  # [B, tokens] fp32
    dx,  # [B, tokens, width] x's type
    sums,  # [B, splits, 2, width] fp32: dscale and dshift over this program's tokens
    tokens,
    width,
    scale_stride,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = 1.0 + tl.load(scale + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    first, last = _first_and_last_token(tokens)
    for token in range(first, last):
        row = sample * tokens + token
        grad = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
        spread = tl.load(rstd + row)
        if CENTRED:
            value = tl.where(inside, value - tl.load(mean + row), 0.0)
        normed = value * spread
        dscale += grad * normed
        dshift += grad
        inner = grad * gain
        result = inner - normed * (tl.sum(inner * normed, axis=0) / width)
        if CENTRED:
            result -= tl.sum(inner, axis=0) / width
        tl.store(dx + row * width + column, result * spread, mask=inside)
    mine = sums + (sample * tl.num_programs(1) + tl.program_id(1)) * 2 * width
    tl.store(mine + column, dscale, mask=inside)
    tl.store(mine + width + column, dshift, mask=inside)


@jit
def _adaln_sum_kernel(
    sums,  # [B, splits, 2, width] fp32
    dscale,  # [B, width] scale's type
    dshift,  # [B, width] scale's type
    splits,
    width,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    scale_total = tl.zeros([BLOCK], tl.float32)
    shift_total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        part = sums + (sample * splits + split) * 2 * width
        scale_total += tl.load(part + column, mask=inside, other=0.0)
        shift_total += tl.load(part + width + column, mask=inside, other=0.0)
    tl.store(dscale + sample * width + column, scale_total, mask=inside)
    tl.store(dshift + sample * width + column, shift_total, mask=inside)


def _grid(x: Tensor) -> tuple[int, int]:
    """(B, splits): enough programs to fill the device, none without a token."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    batch, tokens, _ = x.shape
    return batch, max(1, min(tokens, _PROGRAMS_PER_PROCESSOR * processors // batch))


def _blocks(width: int) -> dict[str, int]:
    # 8 elements a thread make 16-byte accesses in bf16; a row of up to 512 stays within one warp, whose sums need no shared memory.
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": 1 if block <= 512 else min(16, block // 256)}


def _with_unit_columns(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _statistics(x: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    rows = x.shape[:2]
    mean = torch.empty(rows if centred else (0, 0), dtype=torch.float32, device=x.device)
    return mean, torch.empty(rows, dtype=torch.float32, device=x.device)


@torch.library.custom_op("fasttrain::adaln", mutates_args=())
def _adaln_op(x: Tensor, scale: Tensor, shift: Tensor, centred: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, shift = x.contiguous(), _with_unit_columns(scale), _with_unit_columns(shift)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = _statistics(x, centred)
    if y.numel() > 0:
        _, tokens, width = x.shape
        sizes = (tokens, width, scale.stride(0), shift.stride(0))
        with torch.cuda.device_of(x):
            _adaln_forward_kernel[_grid(x)](x, scale, shift, y, mean, rstd, *sizes, eps, CENTRED=centred, **_blocks(width))
    return y, mean, rstd


@_adaln_op.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, centred: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_statistics(x, centred)


@torch.library.custom_op("fasttrain::adaln_backward", mutates_args=())
def _adaln_backward_op(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, scale = dy.contiguous(), x.contiguous(), _with_unit_columns(scale)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dscale = torch.empty(scale.shape, dtype=scale.dtype, device=x.device)
    dshift = torch.empty(scale.shape, dtype=scale.dtype, device=x.device)
    if scale.numel() > 0:
        batch, tokens, width = x.shape
        _, splits = grid = _grid(x)
        sums = torch.empty((batch, splits, 2, width), dtype=torch.float32, device=x.device)
        sizes = (tokens, width, scale.stride(0))
        with torch.cuda.device_of(x):
            _adaln_backward_kernel[grid](dy, x, scale, mean, rstd, dx, sums, *sizes, CENTRED=centred, **_blocks(width))
            _adaln_sum_kernel[batch, triton.cdiv(width, _SUM_BLOCK)](sums, dscale, dshift, splits, width, _SUM_BLOCK, num_warps=1)
    return dx, dscale, dshift


@_adaln_backward_op.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dscale = torch.empty(scale.shape, dtype=scale.dtype, device=x.device)
    return dx, dscale, torch.empty_like(dscale)


def _save(ctx, inputs, output) -> None:
    x, scale, _, ctx.centred, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)


def _backward(ctx, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    return *_adaln_backward_op(dy, *ctx.saved_tensors, ctx.centred), None, None


_adaln_op.register_autograd(_backward, setup_context=_save)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Normalised tokens, scaled and shifted by their sample's modulation.

    y = norm(x) (1 + scale) + shift                                              [Peebles and Xie 2023, section 3.2]

    Args:
        x: tokens, [B, T, D], fp32, bf16 or fp16; the Triton kernel takes D up to 8192.
        scale, shift: [B, D], of one type, any of these; rows of a wider matrix (a chunk of it) are read in place.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm), neither with weights.
        eps: added to the variance, or to the mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        [B, T, D] of x's type, computed in fp32 and rounded once. Differentiable in x, scale and shift.

    Raises:
        ValueError: unknown norm; shapes, types or devices disagree; `impl` cannot run here, or D is too wide for it.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}")
    require_float(x=x, scale=scale, shift=shift)
    if x.dim() != 3 or scale.shape != (x.shape[0], x.shape[2]) or shift.shape != scale.shape or shift.dtype != scale.dtype:
        got = f"{list(x.shape)}, {list(scale.shape)} {scale.dtype} and {list(shift.shape)} {shift.dtype}"
        raise ValueError(f"x must be [B, T, D], scale and shift [B, D] of one type, got {got}")
    require_same_device(x.device, scale=scale, shift=shift)
    if choose(impl, x, scale) == "reference":
        return adaln_reference(x, scale, shift, norm=norm, eps=eps)
    if x.shape[2] > MAX_WIDTH:
        raise ValueError(f"x has D = {x.shape[2]}, the Triton kernel takes at most {MAX_WIDTH}; use impl='reference'")
    y, _, _ = _adaln_op(x, scale, shift, norm == "layer", eps)
    return y
