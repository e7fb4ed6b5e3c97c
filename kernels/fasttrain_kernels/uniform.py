"""One number in (0, 1) for each position: a timestep, or the die that decides whether a label is dropped or an image mirrored.

    independent: u_n = (r0(n) + 1/2) 2^-32,  r0 of Philox counter (0, purpose, n)            [Salmon et al. 2011, section 3.3]
    stratified:  u_n = frac(offset + n / golden ratio),  offset 64 bits of counter (0, purpose, 0)             [Weyl 1916]

Both are exact: integers of 32 or 64 bits, of which float64 keeps all, or the 53 leading ones. So the torch reference and the kernel give
the same bits. position is [B] int64, the result [B] float64: 8 bytes read and 8 written per element. No gradient. In plain torch a draw is
280 launches of a few numbers each, and on a GPU waits for their launching; the kernel is one.
"""

import torch
from torch import Tensor

from fasttrain_kernels.arguments import draw_key
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.philox import Purpose, integers, philox
from fasttrain_kernels.registration import operation

GOLDEN_STEP = 0x9E3779B97F4A7C15 - 2**64
"""2^64 / golden ratio, odd: of all steps the one whose multiples modulo 2^64 spread most evenly. As the int64 of the same bits."""

_GOLDEN_STEP = tl.constexpr(GOLDEN_STEP)
# One number a thread: what counts is that the launch is short.
_BLOCK = 128


def uniform_reference(seed: Tensor | int, position: Tensor, purpose: Purpose, *, stratified: bool = False) -> Tensor:
    """One number in (0, 1) for each position in plain torch, float64."""
    if not stratified:
        first, _, _, _ = philox(seed, 0, purpose, position)
        return (first.to(torch.float64) + 0.5) * 2.0**-32
    low, high, _, _ = philox(seed, 0, purpose, torch.zeros_like(position[:1]))
    phase = (high << 32) + low + position * GOLDEN_STEP
    # The shift copies the sign bit: the mask makes the 64 bits unsigned again.
    return ((phase >> 11) & (2**53 - 1)).double() * 2.0**-53


@jit
def _uniform_kernel(
    seed,  # [] int64
    position,  # [B] int64
    u,  # [B] float64
    batch,
    PURPOSE: tl.constexpr,
    STRATIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = sample < batch
    place = tl.load(position + sample, mask=inside, other=0)
    if STRATIFIED:
        low, high, _, _ = integers(tl.load(seed), place * 0, place * 0, PURPOSE)
        phase = (high.to(tl.int64) << 32) + low.to(tl.int64) + place * _GOLDEN_STEP
        value = ((phase >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
    else:
        first, _, _, _ = integers(tl.load(seed), place, place * 0, PURPOSE)
        value = (first.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    tl.store(u + sample, value, mask=inside)


@operation("uniform", fake=lambda seed, position, *_: torch.empty(position.shape, dtype=torch.float64, device=position.device))
def _uniform_op(seed: Tensor, position: Tensor, purpose: int, stratified: bool) -> Tensor:
    u = torch.empty(position.shape, dtype=torch.float64, device=position.device)
    if u.numel() > 0:
        grid = (triton.cdiv(u.numel(), _BLOCK),)
        with torch.cuda.device_of(position):
            _uniform_kernel[grid](seed, position.contiguous(), u, u.numel(), purpose, stratified, _BLOCK, num_warps=4)
    return u


def uniform(seed: Tensor | int, position: Tensor, purpose: Purpose, *, stratified: bool = False, impl: str = "auto") -> Tensor:
    """One uniform number for each position, a pure function of (seed, position, purpose).

    u_n = (r0(n) + 1/2) 2^-32, or frac(offset(seed) + n / golden ratio)          [Salmon et al. 2011, section 3.3; Weyl 1916]

    Args:
        seed: [] int64 tensor on position's device (an int costs a copy to the device).
        position: [B] int64, the draws' places in training.
        purpose: what is drawn: different purposes draw apart.
        stratified: a low-discrepancy sequence in the position instead of independent draws: any run of successive positions covers the
            interval evenly, and each number alone is uniform over the seeds.
        impl: "auto", "triton" or "reference": the same bits.

    Returns:
        u [B] float64: in (0, 1) with 32 random bits, or stratified in [0, 1) with 53.

    Raises:
        ValueError: shapes, types or devices disagree, or `impl` cannot run here.
    """
    if position.dim() != 1:
        raise ValueError(f"position must be [B], got {list(position.shape)}")
    seed = draw_key(seed, position, position.shape[0], position.device)
    if choose(impl, position) == "reference":
        return uniform_reference(seed, position, purpose, stratified=stratified)
    return _uniform_op(seed, position, int(purpose), stratified)
