"""Noising: the forward process of diffusion, with the noise drawn where it is used.

    x_t = alpha_t x0 + sigma_t eps,   eps ~ N(0, 1) from (seed, position)        [Hang et al. 2023, Eq. 1-2]

x0, x_t are [B, ...] of fp32, bf16 or fp16; alpha, sigma [B] fp32. Computed in fp32. Bytes per element in bf16: 2 read, 2 written
(eps never reaches memory). Nothing but alpha is kept for the backward pass.
"""

import torch
from torch import Tensor

from fasttrain_kernels.philox import normal


def noising_reference(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | int, position: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """x_t = alpha x0 + sigma eps in plain torch, computed in fp32 (float64 for float64 x0)."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    per_sample = (-1,) + (1,) * (x0.dim() - 1)
    eps = normal(seed, position, x0.shape[1:]).to(wide)
    x_t = alpha.to(wide).view(per_sample) * x0.to(wide) + sigma.to(wide).view(per_sample) * eps
    return x_t.to(dtype or x0.dtype)


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
    return noising_reference(x0, alpha, sigma, seed, position, dtype=dtype)
