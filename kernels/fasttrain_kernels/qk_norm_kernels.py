"""The kernels' part that qk_norm and joint_qk_norm share: what a program does with the heads of one sequence of tokens.

A row is one head of one token, WIDTH elements; the rows of a sequence are counted token by token. A program holds GROUPS tiles of ROWS
rows at once. Strides are counted in heads, of WIDTH elements each: so the compiler, which knows WIDTH, sees that every head begins where
an access of 16 bytes may.
"""

from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.processors import processors

MAX_HEAD_WIDTH = 1024
"""A head of one token lives within one program's registers."""
MAX_ROWS = 2**30
"""Of heads of tokens: they are counted in 32 bits, elements in 64."""

_TILE = 1024
"""Elements of q or k that 128 threads hold at once, 8 each: 16-byte accesses in bf16."""
_WARPS = 4
_GROUPS = 2
"""Tiles a program reads at once. On sm_90, with angles, the forward kernels then take 64 registers from Triton 3.7 and 72 from 3.6 (the
joint one 72 and 80), the backward kernels 128 and 168: at least 56 and 60 KB of loads in flight on a processor, of which 31 and 34 KB are
not beyond d = 72 in a tile of 128. Forward, one tile has three quarters of that; num_stages takes 60 % more instructions. Not timed."""
_BACKWARD_PROGRAMS_PER_PROCESSOR = 3
"""One wave from either Triton; of four programs 3.6 would leave one to a wave of its own."""


@jit
def _rotate(x, cos, sin):
    """[GROUPS, ROWS, BLOCK]: each pair of adjacent elements turned by its angle; a thread holds both, so nothing is exchanged."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape)


@jit
def _rstd(x, eps, WIDTH: tl.constexpr):
    """[GROUPS, ROWS, 1]: 1 / sqrt(mean(x^2) + eps); x is 0 beyond WIDTH."""
    return tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / WIDTH + eps)


@jit
def _rows(first, end, tokens, HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """[GROUPS, ROWS] each: sample, token and head of the rows from `first` on, and whether they are before `end`."""
    row = first + tl.arange(0, GROUPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    token = row // HEADS
    return token // tokens, token % tokens, row % HEADS, row < end


@jit
def _elements(sample, token, head, sample_stride, token_stride, head_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[GROUPS, ROWS, BLOCK] int64: the rows' elements, in a tensor of these strides, in heads."""
    start = sample.to(tl.int64) * sample_stride + token.to(tl.int64) * token_stride + head * head_stride
    return (start * WIDTH)[:, :, None] + tl.arange(0, BLOCK)[None, None, :]


@jit
def _weight_tile(weight, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[1, ROWS, BLOCK] fp32: the weight once a row, which makes its loads 16 bytes wide; all but one of them hit the first cache."""
    column = tl.arange(0, BLOCK)[None, None, :]
    return tl.load(weight + tl.zeros([1, ROWS, 1], tl.int32) + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@jit
def _angle_tiles(cos, sin, token, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """2 x [GROUPS, ROWS, BLOCK / 2] fp32: the rows' cosines and sines, which the caches hold."""
    pair = tl.arange(0, BLOCK // 2)[None, None, :]
    mask = inside[:, :, None] & (pair < WIDTH // 2)
    element = (token * (WIDTH // 2))[:, :, None] + pair
    cosine, sine = tl.load(cos + element, mask=mask, other=0.0), tl.load(sin + element, mask=mask, other=0.0)
    return cosine.to(tl.float32), sine.to(tl.float32)


@jit
def forward_tile(
    qkv,  # [B, tokens, 3, HEADS, WIDTH] any float, of any strides of samples and tokens
    q_weight,  # [WIDTH] any float
    k_weight,  # [WIDTH] any float
    cos,  # [tokens, WIDTH / 2] any float, or None
    sin,  # [tokens, WIDTH / 2] any float, or None
    q,  # [B, total, HEADS, WIDTH] qkv's type
    k,  # [B, total, HEADS, WIDTH] qkv's type
    v,  # [B, total, HEADS, WIDTH] qkv's type, or None
    first,
    rows,
    tokens,
    before,
    total,
    sample_stride,
    token_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows from `first` on, of a sequence whose first token is number `before` in q, k and v."""
    sample, token, head, inside = _rows(first, rows, tokens, HEADS, GROUPS, ROWS)
    mask = inside[:, :, None] & (tl.arange(0, BLOCK) < WIDTH)[None, None, :]
    packed = qkv + _elements(sample, token, head, sample_stride, token_stride, 1, WIDTH, BLOCK)
    query = tl.load(packed, mask=mask, other=0.0).to(tl.float32)
    key = tl.load(packed + HEADS * WIDTH, mask=mask, other=0.0).to(tl.float32)
    if v is not None:
        value = tl.load(packed + 2 * HEADS * WIDTH, mask=mask, other=0.0)
    query *= _rstd(query, eps, WIDTH) * _weight_tile(q_weight, WIDTH, ROWS, BLOCK)
    key *= _rstd(key, eps, WIDTH) * _weight_tile(k_weight, WIDTH, ROWS, BLOCK)
    if cos is not None:
        cosine, sine = _angle_tiles(cos, sin, token, inside, WIDTH, BLOCK)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
    split = _elements(sample, token + before, head, total * HEADS, HEADS, 1, WIDTH, BLOCK)
    tl.store(q + split, query, mask=mask)
    tl.store(k + split, key, mask=mask)
    if v is not None:
        tl.store(v + split, value, mask=mask)


@jit
def _gradient(grad, x, gain, eps, WIDTH: tl.constexpr):
    """The gradients of x and, summed over GROUPS, of gain, for the gradient of x rstd gain."""
    spread = _rstd(x, eps, WIDTH)
    normed = x * spread
    dgain = tl.sum(grad * normed, axis=0)
    inner = grad * gain
    return spread * (inner - normed * (tl.sum(inner * normed, axis=2, keep_dims=True) / WIDTH)), dgain


@jit
def backward_rows(
    dq,  # [B, total, HEADS, WIDTH] qkv's type, of any strides, which dk and dv share
    dk,  # [B, total, HEADS, WIDTH] qkv's type
    dv,  # [B, total, HEADS, WIDTH] qkv's type, or None
    qkv,  # [B, tokens, 3, HEADS, WIDTH] any float, of any strides of samples and tokens
    q_weight,  # [WIDTH] any float
    k_weight,  # [WIDTH] any float
    cos,  # [tokens, WIDTH / 2] any float, or None
    sin,  # [tokens, WIDTH / 2] any float, or None
    dqkv,  # [B, tokens, 3, HEADS, WIDTH] qkv's type
    sums,  # [2, WIDTH] fp32: dq_weight and dk_weight over these rows
    start,
    end,
    tokens,
    before,
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
    """Rows `start` to `end`, of a sequence whose first token is number `before` in dq, dk and dv."""
    q_gain = _weight_tile(q_weight, WIDTH, ROWS, BLOCK)
    k_gain = _weight_tile(k_weight, WIDTH, ROWS, BLOCK)
    q_total = tl.zeros([ROWS, BLOCK], tl.float32)
    k_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(start, end, GROUPS * ROWS):
        sample, token, head, inside = _rows(first, end, tokens, HEADS, GROUPS, ROWS)
        mask = inside[:, :, None] & (tl.arange(0, BLOCK) < WIDTH)[None, None, :]
        packed = qkv + _elements(sample, token, head, sample_stride, token_stride, 1, WIDTH, BLOCK)
        split = _elements(sample, token + before, head, grad_sample_stride, grad_token_stride, grad_head_stride, WIDTH, BLOCK)
        target = dqkv + _elements(sample, token, head, tokens * (3 * HEADS), 3 * HEADS, 1, WIDTH, BLOCK)
        query = tl.load(packed, mask=mask, other=0.0).to(tl.float32)
        key = tl.load(packed + HEADS * WIDTH, mask=mask, other=0.0).to(tl.float32)
        query_grad = tl.load(dq + split, mask=mask, other=0.0).to(tl.float32)
        key_grad = tl.load(dk + split, mask=mask, other=0.0).to(tl.float32)
        if dv is None:
            value_grad = tl.zeros_like(query)
        else:
            value_grad = tl.load(dv + split, mask=mask, other=0.0)
        tl.store(target + 2 * HEADS * WIDTH, value_grad, mask=mask)
        if cos is not None:
            cosine, sine = _angle_tiles(cos, sin, token, inside, WIDTH, BLOCK)
            query_grad, key_grad = _rotate(query_grad, cosine, -sine), _rotate(key_grad, cosine, -sine)
        query, q_part = _gradient(query_grad, query, q_gain, eps, WIDTH)
        key, k_part = _gradient(key_grad, key, k_gain, eps, WIDTH)
        q_total += q_part
        k_total += k_part
        tl.store(target, query, mask=mask)
        tl.store(target + HEADS * WIDTH, key, mask=mask)
    column = tl.arange(0, BLOCK)
    tl.store(sums + column, tl.sum(q_total, axis=0), mask=column < WIDTH)
    tl.store(sums + WIDTH + column, tl.sum(k_total, axis=0), mask=column < WIDTH)


def constants(heads: int, width: int) -> dict[str, int]:
    """The kernels' constants for heads of `width` elements."""
    block = max(2, triton.next_power_of_2(width))
    return {"HEADS": heads, "WIDTH": width, "GROUPS": _GROUPS, "ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": _WARPS}


def tile_rows(heads: int, width: int) -> int:
    """How many rows a program holds at once."""
    sizes = constants(heads, width)
    return sizes["GROUPS"] * sizes["ROWS"]


def backward_programs(device: torch.device) -> int:
    """The most programs that share the rows of a backward pass out among them."""
    return _BACKWARD_PROGRAMS_PER_PROCESSOR * processors(device)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Each where it is not missing, its elements side by side."""
    return [None if t is None else t.contiguous() for t in tensors]


def in_whole_heads(width: int, *tensors: Tensor | None) -> list[Any]:
    """The tensors [..., n width] as they are, if heads begin at multiples of `width` elements and all lie alike; else contiguous copies."""
    strides = {t.stride() for t in tensors if t is not None}
    first = next(iter(strides))
    whole = len(strides) == 1 and first[-1] == 1 and all(stride % width == 0 for stride in first[:-1])
    return list(tensors) if whole else contiguous(*tensors)


def strides_in_heads(tensor: Tensor, width: int) -> list[int]:
    """The strides of all dimensions but the last, in heads."""
    return [stride // width for stride in tensor.stride()[:-1]]


def require_room(heads: int, width: int, **sequences: Tensor) -> None:
    """Raises ValueError if the heads are too wide for the kernels, or those of all tokens of the sequences [B, T, ...] too many."""
    rows = heads * sum(qkv.shape[0] * qkv.shape[1] for qkv in sequences.values())
    if width > MAX_HEAD_WIDTH or rows > MAX_ROWS:
        where = " and ".join(f"{name} {list(qkv.shape)}" for name, qkv in sequences.items())
        got = f"{heads} heads of {width} elements in {where}"
        raise ValueError(f"the Triton kernel takes {MAX_ROWS} heads of {MAX_HEAD_WIDTH} elements, got {got}; use impl='reference'")
