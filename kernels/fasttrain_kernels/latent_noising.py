"""From stored latent posteriors to noisy latents in one launch: choose the view, sample the posterior, normalise, add noise.

    view = 1 where flip and r0 < 2^31 for Philox's first integer r0 of (seed, position, FLIP), else 0
    z    = mean + exp(logvar / 2) eps_p,   eps_p ~ N(0, 1) from (seed, position, POSTERIOR)       [Kingma and Welling 2014, Eq. 10]
    x0   = (z - shift_c) scale_c
    x_t  = alpha x0 + sigma eps,           eps ~ N(0, 1) from (seed, position, NOISE)             [Hang et al. 2023, Eq. 1-2]

stored is [B, views, 2, C, H, W] of fp16, bf16 or fp32: the views are the plain and the mirrored image's, and each holds mean and
log-variance; shift, scale [C]; alpha, sigma [B]. Computed in fp32. Results: x_t of any float type, and x0 in fp32, which the loss needs.
Bytes per element of x0 in bf16: 4 read (one view's mean and log-variance), 6 written (x_t and fp32 x0). Of everything stored that is a
quarter with two views: 2.5 bytes an element. No gradient: what goes in is data.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.arguments import draw_key, require_data, require_float, require_per_sample, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.noising import noising_reference
from fasttrain_kernels.philox import Purpose, integers, normal, normals
from fasttrain_kernels.registration import operation
from fasttrain_kernels.uniform import uniform_reference

MAX_PLANE = 2**30
"""H W at most: the kernel finds an element's channel in 32 bits."""

# 8 elements a thread: one 16-byte access of fp16. A latent of 4 x 32 x 32 gives 4 programs; 32 images fill 128 processors. Not timed.
_BLOCK = 1024


class Posterior(NamedTuple):
    """Latents as stored, and all that turns them into x0 but the draw: what a loader hands on."""

    stored: Tensor  # [B, views, 2, C, H, W] any float
    shift: Tensor  # [C] fp32
    scale: Tensor  # [C] fp32
    flip: bool = False

    def sample(self, seed: Tensor | int, position: Tensor) -> Tensor:
        """x0 [B, C, H, W] in plain torch, fp32 (float64 for float64): the same draw as `latent_noising` makes at this seed and position."""
        chosen = self.stored[:, 0]  # [B, 2, C, H, W]
        if self.flip:
            mirrored = uniform_reference(seed, position, Purpose.FLIP) < 0.5
            chosen = torch.where(mirrored[:, None, None, None, None], self.stored[:, 1], chosen)
        mean, logvar = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).unbind(1)  # [B, C, H, W] each
        z = mean + torch.exp(0.5 * logvar) * normal(seed, position, mean.shape[1:], Purpose.POSTERIOR)
        return (z - self.shift[:, None, None]) * self.scale[:, None, None]


def latent_noising_reference(
    stored: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    seed: Tensor | int,
    position: Tensor,
    *,
    flip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_t, x0) in plain torch, computed in fp32 (float64 for float64 stored)."""
    x0 = Posterior(stored, shift, scale, flip).sample(seed, position)
    return noising_reference(x0, alpha, sigma, seed, position, dtype=dtype or stored.dtype), x0


@jit
def _latent_noising_kernel(
    stored,  # [B, VIEWS, 2, size] any float
    shift,  # [C] fp32
    scale,  # [C] fp32
    alpha,  # [B] fp32
    sigma,  # [B] fp32
    seed,  # [] int64
    position,  # [B] int64
    x_t,  # [B, size] any float
    x0,  # [B, size] fp32
    size,  # C H W
    plane,  # H W
    blocks,
    VIEWS: tl.constexpr,
    FLIP: tl.constexpr,  # the purpose, or -1 to take the first view
    POSTERIOR: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    key = tl.load(seed)
    place = tl.load(position + sample)
    mean = stored + sample * (VIEWS * 2) * size + start
    if FLIP >= 0:
        die, _, _, _ = integers(key, place, place * 0, FLIP)
        mean += (1 - (die >> 31).to(tl.int64)) * 2 * size
    lane = tl.arange(0, BLOCK)
    inside = lane < size - start
    logvar = tl.load(mean + size + lane, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(mean + lane, mask=inside, other=0.0).to(tl.float32)
    z += tl.exp(0.5 * logvar) * normals(key, place, start, POSTERIOR, BLOCK)
    # Channels count on from the block's first; within them 32 bits do, and a division in 64 would cost each element much more.
    channel = ((start % plane).to(tl.int32) + lane) // plane
    offset = tl.load(shift + start // plane + channel, mask=inside, other=0.0)
    clean = (z - offset) * tl.load(scale + start // plane + channel, mask=inside, other=0.0)
    noisy = tl.load(alpha + sample) * clean + tl.load(sigma + sample) * normals(key, place, start, NOISE, BLOCK)
    tl.store(x0 + sample * size + start + lane, clean, mask=inside)
    tl.store(x_t + sample * size + start + lane, noisy, mask=inside)


def _outputs(stored: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (stored.shape[0], *stored.shape[3:])
    return torch.empty(shape, dtype=dtype, device=stored.device), torch.empty(shape, dtype=torch.float32, device=stored.device)


@operation("latent_noising", fake=lambda stored, *others: _outputs(stored, others[-1]))
def _latent_noising_op(
    stored: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    seed: Tensor,
    position: Tensor,
    flip: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    stored = stored.contiguous()
    x_t, x0 = _outputs(stored, dtype)
    if x0.numel() > 0:
        batch, views, size, plane = stored.shape[0], stored.shape[1], x0[0].numel(), x0[0, 0].numel()
        blocks = triton.cdiv(size, _BLOCK)
        purposes = (int(Purpose.FLIP) if flip else -1, int(Purpose.POSTERIOR), int(Purpose.NOISE))
        inputs = (stored, shift, scale, alpha, sigma, seed, position)
        with torch.cuda.device_of(stored):
            _latent_noising_kernel[batch * blocks,](*inputs, x_t, x0, size, plane, blocks, views, *purposes, _BLOCK, num_warps=4)
    return x_t, x0


def latent_noising(
    stored: Tensor,
    shift: Tensor,
    scale: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    seed: Tensor | int,
    position: Tensor,
    *,
    flip: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noisy latents and the clean ones they come from, drawn from stored posteriors.

    x0 = (mean + exp(logvar / 2) eps_p - shift_c) scale_c,   x_t = alpha x0 + sigma eps
                                                   [Kingma and Welling 2014, Eq. 10; Hang et al. 2023, Eq. 1-2]

    Args:
        stored: posteriors, [B, views, 2, C, H, W], fp16, bf16 or fp32: one view or two (plain, mirrored), mean and log-variance.
        shift, scale: [C] fp32, of the latents' channels.
        alpha, sigma: [B] fp32, of each sample's timestep.
        seed: [] int64 tensor on stored's device (an int costs a copy to the device).
        position: [B] int64, the draws' places in training.
        flip: take the mirrored view where the position's draw says so: about half of the visits.
        dtype: of x_t; stored's by default.
        impl: "auto", "triton" or "reference".

    Returns:
        (x_t, x0), each [B, C, H, W]: x_t computed in fp32 and rounded once, x0 in fp32. No gradient.

    Raises:
        ValueError: shapes, types or devices disagree, there is no mirrored view to take, an argument wants a gradient, or `impl` cannot
            run here.
    """
    values = {"shift": shift, "scale": scale, "alpha": alpha, "sigma": sigma}
    require_float(stored=stored, **values)
    if stored.dim() != 6 or stored.shape[1] not in (1, 2) or stored.shape[2] != 2:
        raise ValueError(f"stored must be [B, 1 or 2 views, 2, C, H, W], got {list(stored.shape)}")
    if stored.shape[-2:].numel() > MAX_PLANE:
        raise ValueError(f"stored must hold at most {MAX_PLANE} elements a channel, got H x W of {list(stored.shape[-2:])}")
    if flip and stored.shape[1] == 1:
        raise ValueError(f"flip needs a mirrored view, and stored holds one view: {list(stored.shape)}")
    for name in ("shift", "scale"):
        if values[name].shape != stored.shape[3:4]:
            raise ValueError(f"{name} must be [{stored.shape[3]}], one value a channel, got {list(values[name].shape)}")
    require_per_sample(stored.shape[0], alpha=alpha, sigma=sigma)
    require_same_device(stored.device, **values)
    require_data(stored=stored, **values)
    seed = draw_key(seed, position, stored.shape[0], stored.device)
    if choose(impl, stored) == "reference":
        return latent_noising_reference(stored, shift, scale, alpha, sigma, seed, position, flip=flip, dtype=dtype)
    shift, scale, alpha, sigma = (v.to(torch.float32).contiguous() for v in values.values())
    return _latent_noising_op(stored, shift, scale, alpha, sigma, seed, position.contiguous(), flip, dtype or stored.dtype)
