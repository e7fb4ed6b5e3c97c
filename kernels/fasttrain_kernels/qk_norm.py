"""RMS norm of the queries and keys of every head, read from the packed qkv matrix, with an optional rotary embedding.

    n = x rstd, rstd = 1 / sqrt(mean(x^2) + eps), over the d elements of one head        [Zhang and Sennrich 2019, Eq. 4]
    y = n weight, one weight [d] for all queries and one for all keys                [Dehghani et al. 2023, section 2.1]
    (q_2i, q_2i+1) = (y_2i cos_i - y_2i+1 sin_i, y_2i+1 cos_i + y_2i sin_i), cos and sin of the token  [Su et al. 2021, Eq. 34]

    g = dq turned back;   inner = g weight;   dx = rstd (inner - n mean(inner n));   dweight = sum over tokens and heads of g n

qkv is [B, T, 3 h d] (q, k, v; within each the heads; within each d elements), fp32, bf16 or fp16, computed in fp32; it may be a view with
gaps of whole heads between samples or tokens. q and k are written anew, [B, T, h, d] in memory; v stays where it is, as a view. The
backward pass reads the gradients where attention left them, if all three lie alike, and writes the packed one once, dv into its place,
where plain autograd would fill zeros, copy and add. Bytes per element in bf16: q and k 4 forward, 6 backward; v 0 forward, 4 backward.
Kept for the backward pass: qkv, the weights, cos and sin; rstd is computed again from the x that is read anyway (kept, it would cost 4
bytes each way for every head of a token). cos and sin, 4 T d bytes, stay in the caches. The weights' gradients are summed in two passes
of fixed order, without atomics: a program owns a range of (token, head) rows and writes fp32 sums, [programs, 2, d]. They are extra
bytes: for B = 32, T = 256, h = 16, d = 72 on 132 processors 0.2 MB written and read again beside 151 MB.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fasttrain_kernels.arguments import require_constant, require_float, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.partial_sums import sum_rows
from fasttrain_kernels.qk_norm_kernels import (
    backward_programs,
    backward_rows,
    constants,
    contiguous,
    forward_tile,
    in_whole_heads,
    require_room,
    strides_in_heads,
    tile_rows,
)
from fasttrain_kernels.registration import operation


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # 2 x [B, h, T, d/2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)  # [B, h, T, d]


def qk_norm_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *, heads: int, cos: Tensor | None = None, sin: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) in plain torch: q and k normalised and rotated in fp32 (float64 for float64 qkv) and rounded once."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, h, T, d]
    wide = torch.promote_types(qkv.dtype, torch.float32)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
        return (y if cos is None or sin is None else _rotated(y, cos.to(wide), sin.to(wide))).to(qkv.dtype)

    return normed(q, q_weight), normed(k, k_weight), v


@jit
def _qk_norm_forward_kernel(
    qkv,  # [B, T, 3, HEADS, WIDTH] any float, of any strides of samples and tokens
    q_weight,  # [WIDTH] any float
    k_weight,  # [WIDTH] any float
    cos,  # [T, WIDTH / 2] any float, or None
    sin,  # [T, WIDTH / 2] any float, or None
    q,  # [B, T, HEADS, WIDTH] qkv's type
    k,  # [B, T, HEADS, WIDTH] qkv's type
    rows,
    tokens,
    sample_stride,
    token_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * (GROUPS * ROWS)
    forward_tile(
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        q,
        k,
        None,
        first,
        rows,
        tokens,
        0,
        tokens,
        sample_stride,
        token_stride,
        eps,
        HEADS,
        WIDTH,
        GROUPS,
        ROWS,
        BLOCK,
    )


@jit
def _qk_norm_backward_kernel(
    dq,  # [B, T, HEADS, WIDTH] qkv's type, of any strides, which dk and dv share
    dk,  # [B, T, HEADS, WIDTH] qkv's type
    dv,  # [B, T, HEADS, WIDTH] qkv's type, or None
    qkv,  # [B, T, 3, HEADS, WIDTH] any float, of any strides of samples and tokens
    q_weight,  # [WIDTH] any float
    k_weight,  # [WIDTH] any float
    cos,  # [T, WIDTH / 2] any float, or None
    sin,  # [T, WIDTH / 2] any float, or None
    dqkv,  # [B, T, 3, HEADS, WIDTH] qkv's type
    sums,  # [programs, 2, WIDTH] fp32: dq_weight and dk_weight over this program's rows
    rows,
    tokens,
    share,
    sample_stride,
    token_stride,
    grad_sample_stride,
    grad_token_stride,
    grad_head_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0) * share
    end = tl.minimum(start + share, rows)
    mine = sums + tl.program_id(0) * (2 * WIDTH)
    backward_rows(
        dq,
        dk,
        dv,
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        dqkv,
        mine,
        start,
        end,
        tokens,
        0,
        sample_stride,
        token_stride,
        grad_sample_stride,
        grad_token_stride,
        grad_head_stride,
        eps,
        HEADS,
        WIDTH,
        GROUPS,
        ROWS,
        BLOCK,
    )


def _outputs(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    q = torch.empty((*qkv.shape[:2], heads, qkv.shape[2] // (3 * heads)), dtype=qkv.dtype, device=qkv.device)
    return q, torch.empty_like(q)


@operation("qk_norm", fake=lambda qkv, q_weight, k_weight, cos, sin, heads, eps: _outputs(qkv, heads))
def _qk_norm_op(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    q, k = _outputs(qkv, heads)
    if q.numel() > 0:
        (batch, tokens, _), width = qkv.shape, q.shape[3]
        (qkv,), others = in_whole_heads(width, qkv), contiguous(q_weight, k_weight, cos, sin)
        rows = batch * tokens * heads
        programs = triton.cdiv(rows, tile_rows(heads, width))
        with torch.cuda.device_of(qkv):
            _qk_norm_forward_kernel[programs,](
                qkv, *others, q, k, rows, tokens, *strides_in_heads(qkv, width), eps, **constants(heads, width)
            )
    return q, k


def _fake_gradients(dq, dk, dv, qkv, q_weight, *_: object) -> tuple[Tensor, Tensor]:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    return dqkv, torch.empty((2, *q_weight.shape), dtype=q_weight.dtype, device=qkv.device)


@operation("qk_norm_backward", fake=_fake_gradients)
def _qk_norm_backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return dqkv, torch.zeros((2, *q_weight.shape), dtype=q_weight.dtype, device=qkv.device)
    (batch, tokens, _), width = qkv.shape, dq.shape[3]
    grads, (qkv,), others = in_whole_heads(width, dq, dk, dv), in_whole_heads(width, qkv), contiguous(q_weight, k_weight, cos, sin)
    rows, tile = batch * tokens * heads, tile_rows(heads, width)
    share = triton.cdiv(triton.cdiv(rows, backward_programs(qkv.device)), tile) * tile
    sums = torch.empty((triton.cdiv(rows, share), 2, *q_weight.shape), dtype=torch.float32, device=qkv.device)
    strides = [*strides_in_heads(qkv, width), *strides_in_heads(grads[0], width)]
    with torch.cuda.device_of(qkv):
        _qk_norm_backward_kernel[sums.shape[0],](
            *grads, qkv, *others, dqkv, sums, rows, tokens, share, *strides, eps, **constants(heads, width)
        )
    return dqkv, sum_rows(sums, q_weight.dtype)


class _QkNorm(torch.autograd.Function):
    """q, k and v as one operation of autograd, so that v may be a view of qkv and its gradient still arrive here."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, heads, eps):
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.heads, ctx.eps = heads, eps
        ctx.set_materialize_grads(False)
        q, k = _qk_norm_op(qkv, q_weight, k_weight, cos, sin, heads, eps)
        return q, k, qkv.unflatten(2, (3, heads, -1))[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        qkv, *others = ctx.saved_tensors
        some = next(grad for grad in (dq, dk, dv) if grad is not None)
        dq, dk = (torch.zeros_like(some) if grad is None else grad for grad in (dq, dk))
        dqkv, (dq_weight, dk_weight) = _qk_norm_backward_op(dq, dk, dv, qkv, *others, ctx.heads, ctx.eps)
        return dqkv, dq_weight, dk_weight, None, None, None, None


def qk_norm(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised per head, and rotated by their token's angles, from the packed qkv matrix.

    q = rotate(x / sqrt(mean(x^2) + eps) weight)      [Zhang and Sennrich 2019, Eq. 4; rotate: Su et al. 2021, Eq. 34]

    Args:
        qkv: [B, T, 3 h d], fp32, bf16 or fp16: q, k and v, each h heads of d elements; the Triton kernel takes d up to 1024.
        q_weight, k_weight: [d], of one type, any of these.
        heads: h.
        cos, sin: [T, d/2], fp32 or another float type, both or neither, of the angle by which each pair of adjacent elements is
            turned; d must be even.
        eps: added to the mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        (q, k, v), each [B, h, T, d] of qkv's type: q and k computed in fp32 and rounded once, v a view of qkv that must not be written
        to. Differentiable in qkv and the weights; the weights' gradients are summed in fp32.

    Raises:
        ValueError: shapes, types or devices disagree; one of cos and sin is missing, or wants a gradient, or d is odd; `impl` cannot run
            here, or d is too wide or B T h too large for it.
    """
    require_heads(qkv, q_weight, k_weight, heads)
    require_angles(qkv, q_weight, cos, sin)
    if choose(impl, qkv, q_weight) == "reference":
        return qk_norm_reference(qkv, q_weight, k_weight, heads=heads, cos=cos, sin=sin, eps=eps)
    require_room(heads, q_weight.shape[0], qkv=qkv)
    q, k, v = _QkNorm.apply(qkv, q_weight, k_weight, cos, sin, heads, eps)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def require_heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, of: str = "") -> None:
    """Raises ValueError unless qkv holds whole heads and both weights fit them; `of` ends the arguments' names."""
    require_float(**{f"qkv{of}": qkv, f"q_weight{of}": q_weight, f"k_weight{of}": k_weight})
    if qkv.dim() != 3 or heads < 1 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv{of} must be [B, T, 3 h d] with h = heads, got {list(qkv.shape)} and heads = {heads}")
    width = qkv.shape[2] // (3 * heads)
    if q_weight.shape != (width,) or k_weight.shape != (width,) or q_weight.dtype != k_weight.dtype:
        got = f"{list(q_weight.shape)} {q_weight.dtype} and {list(k_weight.shape)} {k_weight.dtype}"
        raise ValueError(f"q_weight{of} and k_weight{of} must both be [{width}] of one type, got {got}")
    require_same_device(qkv.device, **{f"q_weight{of}": q_weight, f"k_weight{of}": k_weight})


def require_angles(qkv: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """Raises ValueError unless cos and sin are both missing, or both hold an angle for each pair of a head's elements."""
    if cos is None or sin is None:
        if cos is sin:
            return
        raise ValueError(f"cos and sin go together, got only {'cos' if sin is None else 'sin'}")
    if weight.shape[0] % 2:
        raise ValueError(f"a rotary embedding turns pairs of elements, and qkv's heads have {weight.shape[0]}: leave cos and sin out")
    shape = (qkv.shape[1], weight.shape[0] // 2)
    if cos.shape != shape or sin.shape != shape:
        raise ValueError(f"cos and sin must be [T, d/2] = {list(shape)}, got {list(cos.shape)} and {list(sin.shape)}")
    require_float(cos=cos, sin=sin)
    require_same_device(qkv.device, cos=cos, sin=sin)
    require_constant("qkv and the weights", cos=cos, sin=sin)
