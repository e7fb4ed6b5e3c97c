"""The second stage of a sum over rows: the programs' partial sums added up in fixed order, without atomics.

A backward kernel whose programs each own a range of rows writes one fp32 row of partial sums a program; this adds the rows. Bytes: 4 a
partial sum, read once.
"""

import torch
from torch import Tensor

from fasttrain_kernels.language import jit, tl, triton

_TILE = 4096
"""Partial sums a program reads at once: 16 a thread in four 16-byte loads, so that a few programs still keep many bytes in flight."""
_MAX_ROWS = 256
_WARPS = 8


@jit
def _sum_rows_kernel(
    parts,  # [rows, columns] fp32
    total,  # [columns] any float
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        sums += tl.load(parts + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)
    tl.store(total + column, tl.sum(sums, axis=0), mask=inside)


def sum_rows(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, ...] fp32 partial sums -> their sum [...] of `dtype`, added in fp32 in an order that only the shape decides."""
    total = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    rows, columns = parts.shape[0], total.numel()
    tile = min(_MAX_ROWS, triton.next_power_of_2(rows))
    block = _TILE // tile
    with torch.cuda.device_of(parts):
        _sum_rows_kernel[triton.cdiv(columns, block),](parts, total, rows, columns, tile, block, num_warps=_WARPS)
    return total
