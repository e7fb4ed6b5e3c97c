"""The kernels behind norm.py, and how they are cut: one forward and one backward kernel for every norm of tokens.

A row of D elements is held as two blocks, the largest power of 2 below D and what is left, rounded up: 1152 as 1024 + 128, where one
block of 2048 would compute 44 % of its lanes for nothing. A program owns some tokens of one group. It holds the group's rows (gain, shift,
gate) and their gradients' fp32 sums in registers, and copies the next tokens into shared memory while it computes the present one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fasttrain_kernels.language import jit, tl, triton


@jit
def _row(rows, stride, column, inside):
    """[BLOCK] fp32: the row of this program's group."""
    return tl.load(rows + tl.program_id(0).to(tl.int64) * stride + column, mask=inside, other=0.0).to(tl.float32)


@jit
def _fetch(tensor, start, column, inside):
    """[BLOCK] fp32: part of the token that begins at element `start`."""
    return tl.load(tensor + start + column, mask=inside, other=0.0).to(tl.float32)


@jit
def _total(main, tail):
    """The sum of both blocks, fp32."""
    if main.shape[0] == tail.shape[0]:
        return tl.sum(main + tail, axis=0)
    else:
        return tl.sum(main, axis=0) + tl.sum(tail, axis=0)


@jit
def _residual(x, branch, gate_row, x_new, start, column, inside):
    """[BLOCK] fp32: x + gate branch as it is stored, or x."""
    value = _fetch(x, start, column, inside)
    if branch is not None:
        added = _fetch(branch, start, column, inside)
        if gate_row is not None:
            added *= gate_row
        stored = (value + added).to(x_new.dtype.element_ty)
        tl.store(x_new + start + column, stored, mask=inside)
        value = stored.to(tl.float32)
    return value


@jit
def _store_affine(y, start, column, inside, normed, gain_row, shift_row):
    result = normed * gain_row
    if shift_row is not None:
        result += shift_row
    tl.store(y + start + column, result, mask=inside)


@jit
def norm_forward_kernel(
    x,  # [groups, tokens, WIDTH] any float
    branch,  # [groups, tokens, WIDTH] x's type, or None
    gate,  # [groups, WIDTH] any float, rows gate_stride apart, or None
    gain,  # [groups, WIDTH] any float, rows gain_stride apart
    shift,  # [groups, WIDTH] any float, rows shift_stride apart, or None
    x_new,  # [groups, tokens, WIDTH] x's type, None without a branch
    y,  # [groups, tokens, WIDTH] x's type
    rstd,  # [groups, tokens] fp32
    mean,  # [groups, tokens] fp32, None for rms
    tokens,
    share,
    gate_stride,
    gain_stride,
    shift_stride,
    eps,
    WIDTH: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x_new = x + gate branch; y = norm(x_new) gain + shift, gain being 1 + the given one where ONE_PLUS."""
    head, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    in_head, in_rest = head < WIDTH, rest < WIDTH
    gain_head, gain_rest = _row(gain, gain_stride, head, in_head), _row(gain, gain_stride, rest, in_rest)
    if ONE_PLUS:
        gain_head += 1.0
        gain_rest += 1.0
    gate_head = None
    gate_rest = None
    if gate is not None:
        gate_head, gate_rest = _row(gate, gate_stride, head, in_head), _row(gate, gate_stride, rest, in_rest)
    shift_head = None
    shift_rest = None
    if shift is not None:
        shift_head, shift_rest = _row(shift, shift_stride, head, in_head), _row(shift, shift_stride, rest, in_rest)
    first = tl.program_id(1) * share
    for token in tl.range(first, tl.minimum(first + share, tokens), num_stages=STAGES):
        row = tl.program_id(0).to(tl.int64) * tokens + token
        start = row * WIDTH
        value_head = _residual(x, branch, gate_head, x_new, start, head, in_head)
        value_rest = _residual(x, branch, gate_rest, x_new, start, rest, in_rest)
        if mean is not None:
            centre = _total(value_head, value_rest) / WIDTH
            tl.store(mean + row, centre)
            value_head = tl.where(in_head, value_head - centre, 0.0)
            value_rest = tl.where(in_rest, value_rest - centre, 0.0)
        spread = tl.rsqrt(_total(value_head * value_head, value_rest * value_rest) / WIDTH + eps)
        tl.store(rstd + row, spread)
        _store_affine(y, start, head, in_head, value_head * spread, gain_head, shift_head)
        _store_affine(y, start, rest, in_rest, value_rest * spread, gain_rest, shift_rest)


@jit
def _normed(x_new, start, column, inside, centre, spread):
    """[BLOCK] fp32: n; past the row's end not 0, but there it only meets dy, which is."""
    value = _fetch(x_new, start, column, inside)
    if centre is not None:
        value -= centre
    return value * spread


@jit
def _store_dx(dx_new, dx, start, column, inside, total):
    """[BLOCK] fp32: the gradient of x, not yet rounded."""
    if dx_new is not None:
        total += _fetch(dx_new, start, column, inside)
    tl.store(dx + start + column, total, mask=inside)
    return total


@jit
def _store_dbranch(branch, gate_row, dbranch, start, column, inside, total):
    """[BLOCK] fp32: what the token adds to dgate."""
    tl.store(dbranch + start + column, total * gate_row, mask=inside)
    return total * _fetch(branch, start, column, inside)


@jit
def norm_backward_kernel(
    dy,  # [groups, tokens, WIDTH] x's type
    dx_new,  # [groups, tokens, WIDTH] x's type, or None
    x_new,  # [groups, tokens, WIDTH] any float
    branch,  # [groups, tokens, WIDTH] x's type, None without a gate
    gate,  # [groups, WIDTH] any float, rows gate_stride apart, or None
    gain,  # [groups, WIDTH] any float, rows gain_stride apart
    rstd,  # [groups, tokens] fp32
    mean,  # [groups, tokens] fp32, None for rms
    dx,  # [groups, tokens, WIDTH] x's type
    dbranch,  # [groups, tokens, WIDTH] x's type, None without a gate
    sums,  # [splits, groups, PARTS, WIDTH] fp32: dgain, dshift and dgate over this program's tokens, those there are
    tokens,
    share,
    gate_stride,
    gain_stride,
    WIDTH: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PARTS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every gradient of norm_forward_kernel in one pass; the formulas are norm.py's."""
    head, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    in_head, in_rest = head < WIDTH, rest < WIDTH
    gain_head, gain_rest = _row(gain, gain_stride, head, in_head), _row(gain, gain_stride, rest, in_rest)
    if ONE_PLUS:
        gain_head += 1.0
        gain_rest += 1.0
    if gate is not None:
        gate_head, gate_rest = _row(gate, gate_stride, head, in_head), _row(gate, gate_stride, rest, in_rest)
    dgain_head, dgain_rest = tl.zeros([MAIN], tl.float32), tl.zeros([TAIL], tl.float32)
    dshift_head, dshift_rest = tl.zeros([MAIN], tl.float32), tl.zeros([TAIL], tl.float32)
    dgate_head, dgate_rest = tl.zeros([MAIN], tl.float32), tl.zeros([TAIL], tl.float32)
    first = tl.program_id(1) * share
    for token in tl.range(first, tl.minimum(first + share, tokens), num_stages=STAGES):
        row = tl.program_id(0).to(tl.int64) * tokens + token
        start = row * WIDTH
        spread = tl.load(rstd + row)
        centre = None
        if mean is not None:
            centre = tl.load(mean + row)
        grad_head, grad_rest = _fetch(dy, start, head, in_head), _fetch(dy, start, rest, in_rest)
        normed_head = _normed(x_new, start, head, in_head, centre, spread)
        normed_rest = _normed(x_new, start, rest, in_rest, centre, spread)
        dgain_head += grad_head * normed_head
        dgain_rest += grad_rest * normed_rest
        dshift_head += grad_head
        dshift_rest += grad_rest
        grad_head *= gain_head
        grad_rest *= gain_rest
        along = _total(grad_head * normed_head, grad_rest * normed_rest) / WIDTH
        total_head = grad_head - normed_head * along
        total_rest = grad_rest - normed_rest * along
        if mean is not None:
            level = _total(grad_head, grad_rest) / WIDTH
            total_head -= level
            total_rest -= level
        total_head = _store_dx(dx_new, dx, start, head, in_head, total_head * spread)
        total_rest = _store_dx(dx_new, dx, start, rest, in_rest, total_rest * spread)
        if gate is not None:
            dgate_head += _store_dbranch(branch, gate_head, dbranch, start, head, in_head, total_head)
            dgate_rest += _store_dbranch(branch, gate_rest, dbranch, start, rest, in_rest, total_rest)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    mine = sums + program * (PARTS * WIDTH)
    tl.store(mine + head, dgain_head, mask=in_head)
    tl.store(mine + rest, dgain_rest, mask=in_rest)
    if SHIFTED:
        tl.store(mine + WIDTH + head, dshift_head, mask=in_head)
        tl.store(mine + WIDTH + rest, dshift_rest, mask=in_rest)
    if gate is not None:
        tl.store(mine + (PARTS - 1) * WIDTH + head, dgate_head, mask=in_head)
        tl.store(mine + (PARTS - 1) * WIDTH + rest, dgate_rest, mask=in_rest)


_MOST_ELEMENTS = 24
"""Of a row in a thread: 768 takes one warp, whose sums need no shared memory, and 1024, 1152 and 1536 take two."""
_REGISTERS = 65_536
"""Of one processor."""
_LONGEST_AHEAD = 8192
"""Bytes of a row that are copied ahead; of four tensors' longer rows not every GPU's shared memory holds two."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut, whatever its width."""

    warps: int
    """That share a processor: their programs are one wave, and a thread gets its part of the registers."""
    stages: int
    """Tokens of a program on their way or in use at once."""


# From machine code for sm_90, bf16, D = 768, 1024, 1152 and 1536; nothing was timed. A processor of an H200 needs about 30 KB on their
# way to fill the memory's bandwidth. Three stages are two tokens of each program: at least 32 KB forward (half of its bytes are writes),
# 40 KB backward. Four instructions a cycle at 1.755 GHz beside 4.3 TB/s: the loop takes at most 56 % of what can be issued (adaln,
# D = 1152, both ways). One block of 2048 takes 95 % (91 %) with four warps; with two 64 % (70 %), and 237 registers instead of 168.
FORWARD = Tiles(warps=16, stages=3)  # 95 to 128 registers
BACKWARD = Tiles(warps=10, stages=3)  # 148 to 200
GATED_BACKWARD = Tiles(warps=8, stages=3)  # 192 to 250, for gain, gate and three sums; fewer programs also write fewer sums


def settings(
    width: int, groups: int, tokens: int, tiles: Tiles, *, element_bytes: int, processors: int
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """The grid (groups, splits), the tokens of a program, and the compiler's settings."""
    main = triton.next_power_of_2(triton.cdiv(width, 2))
    tail = triton.next_power_of_2(max(1, width - main))
    warps = min(16, triton.next_power_of_2(triton.cdiv(main + tail, 32 * _MOST_ELEMENTS)))
    share = _tokens_of_a_program(groups, max(1, tokens), max(1, tiles.warps // warps) * processors)
    grid = (groups, triton.cdiv(max(1, tokens), share))
    stages = tiles.stages if (main + tail) * element_bytes <= _LONGEST_AHEAD else 1
    constants = {"WIDTH": width, "MAIN": main, "TAIL": tail, "STAGES": stages, "num_warps": warps}
    return grid, share, constants if torch.version.hip else {**constants, "maxnreg": _registers_of_a_thread(max(warps, tiles.warps))}


def _registers_of_a_thread(warps: int) -> int:
    return min(255, _REGISTERS // (32 * warps) // 8 * 8)


@cache
def _tokens_of_a_program(groups: int, tokens: int, at_once: int) -> int:
    """How to share a group's tokens out among programs, `at_once` of which run at a time.

    A round of programs lasts as long as its tokens and about three more: to fetch the rows, and to write sums and add them up. Of one to
    eight rounds the choice that ends first, and that of the fewest programs where it is a draw.
    """
    splits = (max(1, min(tokens, rounds * at_once // groups)) for rounds in range(1, 9))
    shares = {triton.cdiv(tokens, split) for split in splits}
    return min(shares, key=lambda share: (triton.cdiv(groups * triton.cdiv(tokens, share), at_once) * (share + 3), -share))
