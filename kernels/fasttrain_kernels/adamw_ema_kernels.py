"""The Triton kernels of AdamW with averages, over one tensor and over a list of tensors in one launch; adamw_ema.py says what they compute.

A launch's numbers, after the scalars on the device (the gradient's factor and whether it is not finite, each may be None): 1 - b1, b2,
1 - b2, sqrt(1 - b2^update), eps, 1 - lr wd, lr / (1 - b1^update), and 1 - decay of every average. They are computed in double precision.
"""

from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.language import jit, tl, triton

Row = list[Any]
"""A tensor's p, g, m, v, weight (or None), and averages, all contiguous."""
GRADIENT = 1
"""The gradient's place in a row: the only tensor that is not written."""
Scalars = tuple[Tensor | None, Tensor | None]
Numbers = tuple[Any, ...]

_BLOCK = 1024
"""Eight elements a thread: one 16-byte load of a bf16 gradient and two of each fp32 tensor. 42 to 56 registers on sm_90 for one tensor with
up to three averages, 56 to 80 for a list (of which three averages spill 8 bytes), so that 6 to 12 programs fit a processor with 26 KB or
more of loads in flight each. Not timed."""
_WARPS = 4
_CHUNK = 32 * _BLOCK
"""What a program of the list's kernel owns: 20,000 programs for 0.7 billion parameters, 160 for each of 132 processors. Not timed."""
_VECTOR = tl.constexpr(8)
"""Elements that a mask keeps or drops together: without that, no access under a mask could be wide."""
MOST_AVERAGES = 3
"""That the kernel of one tensor has arguments for; a list's finds any number in its table."""


@jit
def _lerp(start, end, weight):
    """start + weight (end - start), from the nearer end, as torch.lerp has it."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@jit
def _update(p, g, m, v, emas, weight, element, inside, factor, share1, beta2, share2, root2, eps, keep, rate, shares):
    """The new state of these elements: pointers to tensors' first elements, the gradient's factor, and the launch's numbers."""
    # No store stands before a load that it could hold up: the compiler must assume that tensors overlap.
    grad = tl.load(g + element, mask=inside, other=0.0).to(tl.float32) * factor
    first = tl.load(m + element, mask=inside, other=0.0)
    second = tl.load(v + element, mask=inside, other=0.0)
    master = tl.load(p + element, mask=inside, other=0.0)
    first = _lerp(first, grad, share1)
    second = second * beta2 + share2 * grad * grad
    master = master * keep - rate * first / (tl.sqrt(second) / root2 + eps)
    for i in tl.static_range(len(emas)):
        average = tl.load(emas[i] + element, mask=inside, other=0.0)
        tl.store(emas[i] + element, _lerp(average, master, shares[i]), mask=inside)
    tl.store(m + element, first, mask=inside)
    tl.store(v + element, second, mask=inside)
    tl.store(p + element, master, mask=inside)
    if weight is not None:
        tl.store(weight + element, master, mask=inside)


@jit
def _factor(clip):
    """The gradient's, 1 without clipping."""
    if clip is None:
        factor = 1.0
    else:
        factor = tl.load(clip)
    return factor


@jit
def _elements(size, found_inf):
    """How many to update: none where the gradient is not finite."""
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) == 0, size, 0)
    return size


@jit
def _adamw_ema_kernel(
    p,  # [size] fp32
    g,  # [size] any float
    m,  # [size] fp32
    v,  # [size] fp32
    weight,  # [size] any float, or None
    ema_0,  # [size] fp32, or None
    ema_1,  # [size] fp32, or None
    ema_2,  # [size] fp32, or None
    clip,  # [] fp32, or None
    found_inf,  # [] fp32, or None
    size,
    share1,
    beta2,
    share2,
    root2,
    eps,
    keep,
    rate,
    shares,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor, elements = _factor(clip), _elements(size, found_inf)
    emas = ()
    if ema_0 is not None:
        emas = (ema_0,)  # type: ignore[assignment]
    if ema_1 is not None:
        emas = (ema_0, ema_1)  # type: ignore[assignment]
    if ema_2 is not None:
        emas = (ema_0, ema_1, ema_2)  # type: ignore[assignment]
    whole = elements // _VECTOR * _VECTOR
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _update(p, g, m, v, emas, weight, element, element < whole, factor, share1, beta2, share2, root2, eps, keep, rate, shares)
    if TAIL and tl.program_id(0) == 0:
        last = whole.to(tl.int64) + tl.arange(0, _VECTOR)
        _update(p, g, m, v, emas, weight, last, last < elements, factor, share1, beta2, share2, root2, eps, keep, rate, shares)


@jit
def _address(row, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column of the table's row."""
    pointer = tl.load(row + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _adamw_ema_list_kernel(
    chunks,  # [programs, 2] int64: a tensor's number, and which chunk of it the program owns
    table,  # [tensors, 6 + averages] int64: size, then addresses of p, g, m, v, weight (or 0), and each ema
    clip,  # [] fp32, or None
    found_inf,  # [] fp32, or None
    share1,
    beta2,
    share2,
    root2,
    eps,
    keep,
    rate,
    shares,
    AVERAGES: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAIL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table + tl.load(chunks + 2 * tl.program_id(0)) * (6 + AVERAGES)
    start = tl.load(chunks + 2 * tl.program_id(0) + 1) * CHUNK
    factor, elements = _factor(clip), _elements(tl.load(row), found_inf)
    p, g = _address(row, 1, tl.float32, ALIGNED), _address(row, 2, GRADIENT, ALIGNED)
    m, v = _address(row, 3, tl.float32, ALIGNED), _address(row, 4, tl.float32, ALIGNED)
    weight = None
    if WEIGHT is not None:
        weight = _address(row, 5, WEIGHT, ALIGNED)
    emas = ()
    for i in tl.static_range(AVERAGES):
        emas = emas + (_address(row, 6 + i, tl.float32, ALIGNED),)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no star)
    whole = elements // _VECTOR * _VECTOR
    for step in range(0, CHUNK, BLOCK):
        element = start + step + tl.arange(0, BLOCK)
        _update(p, g, m, v, emas, weight, element, element < whole, factor, share1, beta2, share2, root2, eps, keep, rate, shares)
    if TAIL and start == 0:
        last = whole + tl.arange(0, _VECTOR)
        _update(p, g, m, v, emas, weight, last, last < elements, factor, share1, beta2, share2, root2, eps, keep, rate, shares)


def update_one(row: Row, scalars: Scalars, numbers: Numbers) -> None:
    """The update of one tensor with at most MOST_AVERAGES averages."""
    size = row[0].numel()
    if size > 0:
        grid = (triton.cdiv(size, _BLOCK),)
        averages = (*row[5:], None, None, None)[:MOST_AVERAGES]
        _adamw_ema_kernel[grid](*row[:5], *averages, *scalars, size, *numbers, size % 8 != 0, _BLOCK, num_warps=_WARPS)


def update_list(rows: list[Row], scalars: Scalars, numbers: Numbers) -> None:
    """The update of many tensors in one launch; gradients share one type, and so do weights."""
    sizes = [row[0].numel() for row in rows]
    addresses = [[0 if t is None else t.data_ptr() for t in row] for row in rows]
    chunks = [number for i, size in enumerate(sizes) for chunk in range(triton.cdiv(size, _CHUNK)) for number in (i, chunk)]
    if not chunks:
        return
    table = torch.tensor([*chunks, *(number for size, row in zip(sizes, addresses, strict=True) for number in (size, *row))])
    if (device := rows[0][0].device).type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    types = (None if t is None else getattr(tl, str(t.dtype).removeprefix("torch.")) for t in (rows[0][1], rows[0][4]))
    aligned = all(address % 16 == 0 for row in addresses for address in row)
    tail = any(size % 8 != 0 for size in sizes)
    constants = (len(rows[0]) - 5, *types, aligned, tail, _CHUNK, _BLOCK)
    grid = (len(chunks) // 2,)
    _adamw_ema_list_kernel[grid](table[: len(chunks)], table[len(chunks) :], *scalars, *numbers, *constants, num_warps=_WARPS)
