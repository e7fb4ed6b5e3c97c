"""Noising: the forward process of diffusion, with the noise drawn where it is used.

    x_t = alpha_t x0 + sigma_t eps,   eps ~ N(0, 1) from (seed, position)        [Hang et al. 2023, Eq. 1-2]

    dx0 = alpha_t dx_t

x0, x_t are [B, ...] of fp32, bf16 or fp16; alpha, sigma [B] fp32. Computed in fp32. Bytes per element in bf16: forward and backward
2 read, 2 written (eps never reaches memory). Only alpha is kept for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttrain_kernels.arguments import draw_key, require_constant, require_float, require_per_sample, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.philox import Purpose, normal, normals
from fasttrain_kernels.registration import operation

# 8 elements a thread at 4 warps: one 16-byte access of bf16. A latent of 4 x 32 x 32 gives 4 programs; 32 images fill 128 processors.
# Not timed: the operation is a launch and little else.
_BLOCK = 1024


def noising_reference(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | int, position: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """x_t = alpha x0 + sigma eps in plain torch, computed in fp32 (float64 for float64 x0)."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    per_sample = (-1,) + (1,) * (x0.dim() - 1)
    eps = normal(seed, position, x0.shape[1:]).to(wide)
    x_t = alpha.to(wide).view(per_sample) * x0.to(wide) + sigma.to(wide).view(per_sample) * eps
    return x_t.to(dtype or x0.dtype)


@jit
def _noising_kernel(
    x0,  # [B, size] any float
    x_t,  # [B, size] any float
    alpha,  # [B] fp32
    sigma,  # [B] fp32, or None where no noise is added
    seed,  # [] int64, or None
    position,  # [B] int64, or None
    size,
    blocks,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < size - start
    value = tl.load(alpha + sample) * tl.load(x0 + sample * size + start + lane, mask=inside, other=0.0).to(tl.float32)
    if sigma is not None:
        value += tl.load(sigma + sample) * normals(tl.load(seed), tl.load(position + sample), start, PURPOSE, BLOCK)
    tl.store(x_t + sample * size + start + lane, value, mask=inside)


@operation("noising", fake=lambda x0, *others: torch.empty(x0.shape, dtype=others[-1], device=x0.device))
def _noising_op(x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    return _launch(x0, dtype, alpha, sigma, seed, position)


@operation("noising_backward", fake=lambda dx_t, alpha, dtype: torch.empty(dx_t.shape, dtype=dtype, device=dx_t.device))
def _noising_backward_op(dx_t: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    return _launch(dx_t, dtype, alpha)


def _launch(
    x0: Tensor, dtype: torch.dtype, alpha: Tensor, sigma: Tensor | None = None, seed: Tensor | None = None, position: Tensor | None = None
) -> Tensor:
    x0 = x0.contiguous()
    x_t = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    if x_t.numel() > 0:
        size = x0[0].numel()
        blocks = triton.cdiv(size, _BLOCK)
        inputs = (alpha, sigma, seed, position, size, blocks)
        with torch.cuda.device_of(x0):
            _noising_kernel[x0.shape[0] * blocks,](x0, x_t, *inputs, int(Purpose.NOISE), _BLOCK, num_warps=4)
    return x_t


class _Noising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(alpha)
        ctx.dtype = x0.dtype
        return _noising_op(x0, alpha, sigma, seed, position, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (alpha,) = ctx.saved_tensors
        return _noising_backward_op(grad, alpha, ctx.dtype), *[None] * 5


def noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    seed: Tensor | int,
    position: Tensor,
    *,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Noisy samples, with the noise drawn from (seed, position).

    x_t = alpha x0 + sigma eps                                                   [Hang et al. 2023, Eq. 1-2]

    Args:
        x0: clean latents or pixels, [B, ...], fp32, bf16 or fp16.
        alpha, sigma: [B] fp32, of each sample's timestep.
        seed: [] int64 tensor on x0's device (an int costs a copy to the device).
        position: [B] int64, the draws' places in training.
        dtype: of the result; x0's by default.
        impl: "auto", "triton" or "reference".

    Returns:
        x_t, x0's shape, computed in fp32 and rounded once. Differentiable in x0.

    Raises:
        ValueError: shapes, types or devices disagree, or `impl` cannot run here.
    """
    require_float(x0=x0, alpha=alpha, sigma=sigma)
    if x0.dim() < 2:
        raise ValueError(f"x0 must be [B, ...], got {list(x0.shape)}")
    require_per_sample(x0.shape[0], alpha=alpha, sigma=sigma)
    require_same_device(x0.device, alpha=alpha, sigma=sigma)
    require_constant("x0", alpha=alpha, sigma=sigma)
    seed = draw_key(seed, position, x0.shape[0], x0.device)
    if choose(impl, x0) == "reference":
        return noising_reference(x0, alpha, sigma, seed, position, dtype=dtype)
    alpha, sigma = (values.to(torch.float32).contiguous() for values in (alpha, sigma))
    return _Noising.apply(x0, alpha, sigma, seed, position.contiguous(), dtype or x0.dtype)
