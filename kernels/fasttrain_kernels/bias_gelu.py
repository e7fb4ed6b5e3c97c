"""The bias and the GELU between the MLP's two matrices, in one pass over memory.

    u = x + bias
    none: y = u Phi(u), Phi(u) = (1 + erf(u / sqrt 2)) / 2                       [Hendrycks and Gimpel 2016, section 2]
    tanh: y = u (1 + tanh(z / 2)) / 2 = u / (1 + exp(-z)), z = 2 sqrt(2 / pi) (u + 0.044715 u^3)              [ibid.]

    dx = dy gelu'(u);   dbias = sum over rows of dx, before dx is rounded

x, y are [..., D], bias [D]; fp32, bf16 or fp16, computed in fp32. Bytes per element in bf16: forward 2 read, 2 written; backward 4 read,
2 written. Kept for the backward pass: x and bias. dbias is summed in two passes of fixed order, without atomics: a program owns a block
of columns and a range of rows and writes fp32 sums, [splits, D]. They are extra bytes: at 8192 x 4608 on 132 processors 43 splits,
0.8 MB written and read again beside 226 MB.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fasttrain_kernels.arguments import require_float, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.partial_sums import sum_rows
from fasttrain_kernels.processors import processors
from fasttrain_kernels.registration import operation

APPROXIMATIONS = ("none", "tanh")
MAX_ROWS = 2**30
"""Rows are counted in 32 bits, elements in 64: rows in 64 bits cost the backward kernel 12 registers."""

_COLUMNS = 256
"""A warp's 32 threads of 8 elements: 16-byte accesses in bf16. It divides 4 x 768, 4 x 1024, 4 x 1152 and 4 x 1536."""
_FORWARD = {"groups": 4, "num_warps": 4}
"""Four loads of x a thread in flight, 55 registers at most on sm_90. Not timed."""
_BACKWARD = {"groups": 2, "num_warps": 4}
"""Two loads of x and of dy a thread. On sm_90 at most 64 registers from Triton 3.7, 80 from 3.6. Not timed."""
_PROGRAMS_PER_PROCESSOR = 6
"""One wave from either Triton, with 48 KB in flight on a processor; of eight programs 3.6 would leave two to a wave of their own."""


def bias_gelu_reference(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(x + bias) in plain torch, computed in fp32 (float64 for float64 x) and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(wide) + bias.to(wide), approximate=approximate).to(x.dtype)


@jit
def _tanh_parts(u):
    """exp(-z) and 1 / (1 + exp(-z)), which is (1 + tanh(z / 2)) / 2; no NaN where exp(-z) overflows."""
    # rsqrt squared and exp2 are one instruction each; a division and exp are five to ten, which would set the pace instead of memory.
    small = tl.exp2(u * (-2.302208198 - 0.1029432396 * u * u))
    root = tl.rsqrt(1.0 + small)
    return small, root * root


@jit
def _erf_parts(u):
    """exp(-u^2 / 2) and Phi(u), whose error is at most 7.5e-8 [Abramowitz and Stegun 1964, 7.1.26]."""
    root = tl.rsqrt(1.0 + 0.2316418882 * tl.abs(u))
    t = root * root
    polynomial = 0.1274147959 + t * (-0.1422483677 + t * (0.7107068706 + t * (-0.7265760135 + t * 0.5307027145)))
    small = tl.exp2(u * -0.7213475204 * u)
    tail = polynomial * t * small
    return small, tl.where(u >= 0, 1.0 - tail, tail)


@jit
def _gelu(u, TANH: tl.constexpr):
    if TANH:
        _, share = _tanh_parts(u)
    else:
        _, share = _erf_parts(u)
    return u * share


@jit
def _gelu_slope(u, TANH: tl.constexpr):
    if TANH:
        # Beyond 9 the slope is 0 or 1 in fp32; within, no factor overflows, so that 0 times infinity does not arise.
        near = tl.clamp(u, -9.0, 9.0, propagate_nan=tl.PropagateNan.ALL)
        small, share = _tanh_parts(near)
        return share + small * share * share * near * (1.5957691216 + 0.2140644488 * near * near)
    small, share = _erf_parts(u)
    return share + u * (0.3989422804 * small)


@jit
def _tile(first, rows, width, column_blocks, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[GROUPS, ROWS, COLUMNS] offsets and mask of this program's columns in the rows from `first` on."""
    row = first + tl.arange(0, GROUPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    element = row.to(tl.int64)[:, :, None] * width + column[None, None, :]
    return element, (row < rows)[:, :, None] & (column < width)[None, None, :]


@jit
def _bias_tile(bias, width, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[1, ROWS, COLUMNS] fp32: the bias once a row, which makes its loads 16 bytes wide; all but one of them hit the first cache."""
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    repeated = tl.zeros([1, ROWS, 1], tl.int32) + column[None, None, :]
    return tl.load(bias + repeated, mask=(column < width)[None, None, :], other=0.0).to(tl.float32)


@jit
def _bias_gelu_forward_kernel(
    x,  # [rows, width] any float
    bias,  # [width] any float
    y,  # [rows, width] x's type
    rows,
    width,
    column_blocks,
    TANH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0) // column_blocks * (GROUPS * ROWS)
    element, mask = _tile(first, rows, width, column_blocks, GROUPS, ROWS, COLUMNS)
    u = tl.load(x + element, mask=mask, other=0.0).to(tl.float32) + _bias_tile(bias, width, column_blocks, ROWS, COLUMNS)
    tl.store(y + element, _gelu(u, TANH), mask=mask)


@jit
def _bias_gelu_backward_kernel(
    dy,  # [rows, width] x's type
    x,  # [rows, width] any float
    bias,  # [width] any float
    dx,  # [rows, width] x's type
    sums,  # [splits, width] fp32: dx over this program's rows
    rows,
    width,
    column_blocks,
    share,
    TANH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    split = tl.program_id(0) // column_blocks
    offset = _bias_tile(bias, width, column_blocks, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, rows), GROUPS * ROWS):
        element, mask = _tile(first, rows, width, column_blocks, GROUPS, ROWS, COLUMNS)
        u = tl.load(x + element, mask=mask, other=0.0).to(tl.float32) + offset
        result = tl.load(dy + element, mask=mask, other=0.0).to(tl.float32) * _gelu_slope(u, TANH)
        total += tl.sum(result, axis=0)
        tl.store(dx + element, result, mask=mask)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + split.to(tl.int64) * width + column, tl.sum(total, axis=0), mask=column < width)


def _tiles(width: int, groups: int, num_warps: int) -> dict[str, int]:
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    return {"GROUPS": groups, "ROWS": num_warps * _COLUMNS // columns, "COLUMNS": columns, "num_warps": num_warps}


def _rows_of_a_program(rows: int, column_blocks: int, step: int, x: Tensor) -> int:
    """A multiple of `step` rows, such that the programs fill the device once."""
    splits = max(1, _PROGRAMS_PER_PROCESSOR * processors(x.device) // column_blocks)
    return triton.cdiv(triton.cdiv(rows, splits), step) * step


@operation("bias_gelu", fake=lambda x, bias, tanh: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def _bias_gelu_op(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        width = x.shape[-1]
        rows, tiles = x.numel() // width, _tiles(width, **_FORWARD)
        column_blocks = triton.cdiv(width, tiles["COLUMNS"])
        programs = triton.cdiv(rows, tiles["GROUPS"] * tiles["ROWS"]) * column_blocks
        with torch.cuda.device_of(x):
            _bias_gelu_forward_kernel[programs,](x, bias, y, rows, width, column_blocks, TANH=tanh, **tiles)
    return y


def _fake_gradients(dy: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(bias.shape, dtype=bias.dtype, device=x.device)


@operation("bias_gelu_backward", fake=_fake_gradients)
def _bias_gelu_backward_op(dy: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    dy, x, bias = dy.contiguous(), x.contiguous(), bias.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, torch.zeros(bias.shape, dtype=bias.dtype, device=x.device)
    width = x.shape[-1]
    rows, tiles = x.numel() // width, _tiles(width, **_BACKWARD)
    column_blocks = triton.cdiv(width, tiles["COLUMNS"])
    share = _rows_of_a_program(rows, column_blocks, tiles["GROUPS"] * tiles["ROWS"], x)
    sums = torch.empty((triton.cdiv(rows, share), width), dtype=torch.float32, device=x.device)
    programs = sums.shape[0] * column_blocks
    with torch.cuda.device_of(x):
        _bias_gelu_backward_kernel[programs,](dy, x, bias, dx, sums, rows, width, column_blocks, share, TANH=tanh, **tiles)
    return dx, sum_rows(sums, bias.dtype)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, tanh):
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        return _bias_gelu_op(x, bias, tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_bias_gelu_backward_op(dy, *ctx.saved_tensors, ctx.tanh), None


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none", impl: str = "auto") -> Tensor:
    """The Gaussian error linear unit of x + bias.

    none: u Phi(u);   tanh: u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2       [Hendrycks and Gimpel 2016, section 2]

    Args:
        x: [..., D], fp32, bf16 or fp16: a linear layer's output without its bias.
        bias: [D], any of these types.
        approximate: "none" (exact: Phi to 7.5e-8) or "tanh", as torch.nn.GELU names them.
        impl: "auto", "triton" or "reference".

    Returns:
        x's shape and type, computed in fp32 and rounded once. Differentiable in x and bias; bias's gradient is summed in fp32.

    Raises:
        ValueError: unknown approximation; shapes, types or devices disagree; `impl` cannot run here, or the rows are too many for it.
    """
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"unknown approximate {approximate!r}; known: {', '.join(APPROXIMATIONS)}")
    require_float(x=x, bias=bias)
    if x.dim() < 1 or bias.shape != x.shape[-1:]:
        raise ValueError(f"x must be [..., D] and bias [D], got {list(x.shape)} and {list(bias.shape)}")
    require_same_device(x.device, bias=bias)
    if choose(impl, x, bias) == "reference":
        return bias_gelu_reference(x, bias, approximate=approximate)
    if x.numel() > MAX_ROWS * x.shape[-1]:
        raise ValueError(f"x is {list(x.shape)}, the Triton kernel takes at most {MAX_ROWS} rows; use impl='reference'")
    return _BiasGelu.apply(x, bias, approximate == "tanh")
