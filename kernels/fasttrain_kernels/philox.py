"""Counter-based randomness: every number is a pure function of (seed, purpose, position, element).

Philox 4x32-10 [Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3; Random123]:

    key = 64-bit seed (low word, high word);  counter = (element // 4, purpose, position low, position high)

One evaluation gives four 32-bit integers r0..r3, which serve the elements 4k .. 4k+3. The same integers come from plain torch on any
device and from the Triton kernels. Normals are Box and Muller's, on the pairs (r0, r1) and (r2, r3):

    radius = sqrt(-2 ln u),  u = (fp32(r0) + 1/2) / 2^32      angle = 2 pi (r1 - 2^29) / 2^32
    z0 = radius cos(angle),  z1 = radius sin(angle)

u is never 0: it lies in [2^-33, 1] and keeps 24 significant bits, so all 32 bits count in the tail. Hence |z| <= sqrt(66 ln 2) = 6.764,
which a true normal exceeds once in 7e10 draws. The angle keeps all 32 bits; its eighth-turn offset puts each quarter turn's middle, where
short series are exact enough, at a multiple of a quarter turn. Torch evaluates this in float64 and rounds once to fp32 (the
specification); Triton evaluates it in fp32, within 2e-6 of that.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from fasttrain_kernels.language import jit, tl

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class Purpose(IntEnum):
    """What a number is drawn for: the same position serves all of them without overlap."""

    NOISE = 0
    TIMESTEP = 1
    LABEL_DROP = 2
    FLIP = 3
    POSTERIOR = 4
    ORDER = 5
    SAMPLE = 6
    HELD_OUT = 7
    SUBSTITUTE = 8
    CONTROL_DROP = 9
    TEXT_PADDING = 10
    CROP = 11


def int64_tensor(value: Tensor | int, device: torch.device | None) -> Tensor:
    """A tensor as it is; a Python int, taken modulo 2^64, as a [] int64 tensor on `device`."""
    if isinstance(value, Tensor):
        return value
    # Filled on the device: torch.tensor would copy from the host and wait for the device, several times a step.
    return torch.full((), (int(value) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def philox(seed: Tensor | int, index: Tensor | int, purpose: Tensor | int, position: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 of key `seed` and counter (index, purpose, position low, position high) [Salmon et al. 2011, section 3.3].

    Args:
        seed: int64, all 64 bits used; a Python int is taken modulo 2^64.
        index, purpose: int64 in [0, 2^32).
        position: int64, all 64 bits used.

    Returns:
        Four int64 tensors with values in [0, 2^32), of the arguments' common broadcast shape.
    """
    device = next((a.device for a in (seed, index, purpose, position) if isinstance(a, Tensor)), None)
    seed, index, purpose, position = (int64_tensor(a, device) for a in (seed, index, purpose, position))
    c0, c1, c2, c3 = torch.broadcast_tensors(index & _WORD, purpose & _WORD, position & _WORD, (position >> 32) & _WORD)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))  # type: ignore[return-value]


def normal(seed: Tensor | int, position: Tensor, shape: Sequence[int], purpose: Purpose = Purpose.NOISE) -> Tensor:
    """Standard normal numbers for each position; the formula is at the top of this file.

    Args:
        seed: [] int64.
        position: [B] int64.
        shape: of one sample; element e of the flattened sample is output e % 4 of counter index e // 4.

    Returns:
        [B, *shape] fp32, each value rounded once from float64.
    """
    if position.dim() != 1:
        raise ValueError(f"position must be [B], got {tuple(position.shape)}")
    size = math.prod(shape)
    index = torch.arange((size + 3) // 4, device=position.device)
    r0, r1, r2, r3 = philox(seed, index, purpose, position[:, None])
    values = torch.stack([*_box_muller(r0, r1), *_box_muller(r2, r3)], dim=-1)
    return values.flatten(1)[:, :size].reshape(position.shape[0], *shape)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, through 16-bit halves because int64 cannot hold the whole."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    # fp32 on purpose: it is how the kernels see these integers, so the tails agree exactly.
    open_unit = (first.to(torch.float32) + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(open_unit.to(torch.float64)))
    angle = (second - 2**29).to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    return (radius * torch.cos(angle)).to(torch.float32), (radius * torch.sin(angle)).to(torch.float32)


@jit
def normals(
    seed,  # int64
    position,  # int64
    start,  # int, a multiple of 4
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least 4
):
    """[BLOCK] fp32 in a kernel: `normal`'s elements start .. start + BLOCK - 1 of the sample at `position`."""
    r0, r1, r2, r3 = integers(seed, position, start // 4 + tl.arange(0, BLOCK // 4), PURPOSE)
    z0, z1 = _box_muller_kernel(r0, r1)
    z2, z3 = _box_muller_kernel(r2, r3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])


@jit
def integers(seed, position, index, PURPOSE: tl.constexpr):
    """Four uint32 blocks shaped like `index` in a kernel: the same as `philox`."""
    index = index.to(tl.uint32)
    zero = tl.zeros_like(index)
    low = position.to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    return tl.philox(seed, index, zero + PURPOSE, zero + low, zero + high)


@jit
def _box_muller_kernel(first, second):
    # tl.sin and tl.cos carry a slow path with local memory for huge arguments. Here the angle is known to lie within an eighth turn of
    # a quarter turn's middle, so the first terms of the Taylor series do: what they leave out is below 3e-8.
    open_unit = (first.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    radius = tl.sqrt(-2.0 * tl.log(open_unit))
    quarter = second >> 30
    angle = ((second & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    square = angle * angle
    sine = angle * (1.0 + square * (-1.0 / 6 + square * (1.0 / 120 + square * (-1.0 / 5040 + square * (1.0 / 362880)))))
    cosine = 1.0 + square * (-1.0 / 2 + square * (1.0 / 24 + square * (-1.0 / 720 + square * (1.0 / 40320))))
    odd = (quarter & 1) == 1
    along = tl.where(odd, sine, cosine)
    across = tl.where(odd, cosine, sine)
    turned_cosine = tl.where((quarter == 1) | (quarter == 2), -along, along)
    turned_sine = tl.where(quarter >= 2, -across, across)
    return radius * turned_cosine, radius * turned_sine
