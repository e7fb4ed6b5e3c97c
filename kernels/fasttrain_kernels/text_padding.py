"""Noisy replicate padding of captions: the places behind a caption's own tokens hold them again, and all are noised a little.

    y_i = x_(i mod m) + noise sqrt(M / m - 1) sigma eps_i,   eps ~ N(0, 1) from (seed, position, TEXT_PADDING)
                                                                                        [Berrada et al. 2024, Eq. 7]

m is the caption's number of tokens, at least 1, of M places; sigma each channel's standard deviation over them. x is [B, M, E] of fp32,
bf16 or fp16, y fp32, computed in fp32. Two kernels: a program of the first holds all of a caption for some
channels and writes the size of their noise, [B, E]; the second gathers and draws. Bytes per element in bf16: 2 m / M and 2 read, 4 written;
eps never reaches memory, where plain torch keeps its integers in int64, several times. No gradient: what goes in is data.
"""

import torch
from torch import Tensor

from fasttrain_kernels.arguments import draw_key, require_data, require_float, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.philox import Purpose, normal, normals
from fasttrain_kernels.registration import operation

MAX_PLACES = 1024
"""M at most: a program of the first kernel holds all places of a few channels."""
MAX_SIZE = 2**30
"""M E at most: the second kernel finds an element's token in 32 bits."""

# 8 elements a thread: 16-byte accesses of fp16. A caption of 77 x 768 gives 58 programs. Not timed.
_BLOCK = 1024
_HELD = 8192
"""Elements of a caption in the registers of 8 warps, 32 a thread: 64 channels of 77 tokens."""


def text_padding_reference(tokens: Tensor, length: Tensor, seed: Tensor | int, position: Tensor, *, noise: float = 0.02) -> Tensor:
    """y in plain torch, in fp32 (float64 for float64 tokens)."""
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    places = torch.arange(x.shape[1], device=x.device)
    own = length.clamp(1, max(1, x.shape[1]))[:, None, None]  # [B, 1, 1]
    mine = places[:, None] < own  # [B, M, 1]
    copies = x[torch.arange(len(x), device=x.device)[:, None], places % own[:, :, 0]]
    mean = x.masked_fill(~mine, 0).sum(1, keepdim=True) / own
    deviation = ((x - mean).masked_fill(~mine, 0).square().sum(1, keepdim=True) / own).sqrt()  # [B, 1, E]
    eps = normal(seed, position, x.shape[1:], Purpose.TEXT_PADDING)
    return copies + noise * (x.shape[1] / own - 1).sqrt() * deviation * eps


@jit
def _size_kernel(
    tokens,  # [B, places, width] any float
    length,  # [B] int64
    size,  # [B, width] fp32: what eps is multiplied by
    noise,
    places,
    width,
    blocks,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    own = tl.minimum(tl.maximum(tl.load(length + sample), 1), places).to(tl.int32)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    place = tl.arange(0, PLACES)
    mask = (place < own)[:, None] & inside[None, :]
    value = tl.load(tokens + (sample * places + place)[:, None] * width + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.where(mask, value - (tl.sum(value, axis=0) / own)[None, :], 0.0)
    variance = tl.sum(value * value, axis=0) / own
    spread = tl.sqrt((places - own) / own)
    tl.store(size + sample * width + channel, noise * spread * tl.sqrt(variance), mask=inside)


@jit
def _text_padding_kernel(
    tokens,  # [B, places, width] any float
    length,  # [B] int64
    size,  # [B, width] fp32
    seed,  # [] int64
    position,  # [B] int64
    padded,  # [B, places, width] fp32
    places,
    width,
    blocks,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    own = tl.minimum(tl.maximum(tl.load(length + sample), 1), places).to(tl.int32)
    element = start + tl.arange(0, BLOCK)
    inside = element < places * width
    channel = element % width
    source = (element // width) % own * width + channel
    value = tl.load(tokens + sample * places * width + source, mask=inside, other=0.0).to(tl.float32)
    spread = tl.load(size + sample * width + channel, mask=inside, other=0.0)
    value += spread * normals(tl.load(seed), tl.load(position + sample), start, PURPOSE, BLOCK)
    tl.store(padded + sample * places * width + element, value, mask=inside)


@operation("text_padding", fake=lambda tokens, *_: torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device))
def _text_padding_op(tokens: Tensor, length: Tensor, seed: Tensor, position: Tensor, noise: float) -> Tensor:
    tokens = tokens.contiguous()
    padded = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    if padded.numel() > 0:
        batch, places, width = tokens.shape
        size = torch.empty((batch, width), dtype=torch.float32, device=tokens.device)
        held, blocks = triton.next_power_of_2(places), triton.cdiv(places * width, _BLOCK)
        channels = min(_HELD // held, triton.next_power_of_2(width))
        groups = triton.cdiv(width, channels)
        with torch.cuda.device_of(tokens):
            # All along x: a grid's other two extents end at 65,535.
            _size_kernel[batch * groups,](tokens, length, size, noise, places, width, groups, held, channels, num_warps=8)
            _text_padding_kernel[batch * blocks,](
                tokens, length, size, seed, position, padded, places, width, blocks, int(Purpose.TEXT_PADDING), _BLOCK, num_warps=4
            )
    return padded


def text_padding(
    tokens: Tensor, length: Tensor, seed: Tensor | int, position: Tensor, *, noise: float = 0.02, impl: str = "auto"
) -> Tensor:
    """Captions whose free places hold their own tokens again, with noise drawn from (seed, position) everywhere.

    y_i = x_(i mod m) + noise sqrt(M / m - 1) sigma eps_i                                        [Berrada et al. 2024, Eq. 7]

    Args:
        tokens: x, [B, M, E], fp32, bf16 or fp16; what is behind a caption's own tokens counts for nothing.
        length: [B] int64, each caption's own tokens m, taken as 1 at least and M at most.
        seed: [] int64 tensor on the tokens' device (an int costs a copy to the device).
        position: [B] int64, the draws' places in training.
        noise: the paper's beta_txt.
        impl: "auto", "triton" or "reference".

    Returns:
        y [B, M, E] in fp32. No gradient.

    Raises:
        ValueError: shapes, types or devices disagree, the tokens want a gradient; `impl` cannot run here, or a caption is too large
            for it.
    """
    require_float(tokens=tokens)
    if tokens.dim() != 3:
        raise ValueError(f"tokens must be [B, M, E], got {list(tokens.shape)}")
    if length.shape != tokens.shape[:1] or length.dtype != torch.int64:
        raise ValueError(f"length must be [{tokens.shape[0]}] int64, one number a caption, got {list(length.shape)} {length.dtype}")
    require_same_device(tokens.device, length=length)
    require_data(tokens=tokens)
    seed = draw_key(seed, position, tokens.shape[0], tokens.device)
    if choose(impl, tokens) == "reference":
        return text_padding_reference(tokens, length, seed, position, noise=noise)
    if tokens.shape[1] > MAX_PLACES or tokens.shape[1:].numel() > MAX_SIZE:
        most = f"{MAX_PLACES} places and {MAX_SIZE} elements a caption"
        raise ValueError(f"the Triton kernel takes {most}, got tokens {list(tokens.shape)}; use impl='reference'")
    return _text_padding_op(tokens, length.contiguous(), seed, position.contiguous(), noise)
