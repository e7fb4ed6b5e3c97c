"""Adaptive layer norm: LayerNorm or RMSNorm without weights, then each sample's own scale and shift.

    layer: n = (x - mean) rstd, rstd = 1 / sqrt(var + eps)     rms: n = x rstd, rstd = 1 / sqrt(mean(x^2) + eps)
    y = n (1 + scale_b) + shift_b                                                [Peebles and Xie 2023, section 3.2]

    g = dy (1 + scale_b);   dx = rstd (g - mean(g) - n mean(g n)), without mean(g) for rms
    dscale_b = sum over tokens of dy n;   dshift_b = sum over tokens of dy

x, y are [B, T, D]; scale, shift [B, D], rows of a wider matrix allowed; fp32, bf16 or fp16, computed in fp32 (norm.py holds the kernels
and the registration). Bytes per element in bf16: forward 2 read, 2 written; backward 4 read, 2 written. Kept for the backward pass: x,
scale and the statistics (mean, rstd) in fp32.
"""

import torch
from torch import Tensor

from fasttrain_kernels.arguments import require_float, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.norm import fused, normalised, require_fitting_width, require_norm


def adaln_reference(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6) -> Tensor:
    """norm(x) * (1 + scale) + shift in plain torch, computed in fp32 (float64 for float64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = normalised(x.to(wide), norm, eps)
    return (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(x.dtype)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Normalised tokens, scaled and shifted by their sample's modulation.

    y = norm(x) (1 + scale) + shift                                              [Peebles and Xie 2023, section 3.2]

    Args:
        x: tokens, [B, T, D], fp32, bf16 or fp16; the Triton kernel takes D up to 8192.
        scale, shift: [B, D], of one type, any of these; rows of a wider matrix (a chunk of it) are read in place.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm), neither with weights.
        eps: added to the variance, or to the mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        [B, T, D] of x's type, computed in fp32 and rounded once. Differentiable in x, scale and shift.

    Raises:
        ValueError: unknown norm; shapes, types or devices disagree; `impl` cannot run here, or D is too wide for it.
    """
    require_norm(norm)
    require_float(x=x, scale=scale, shift=shift)
    if x.dim() != 3 or scale.shape != (x.shape[0], x.shape[2]) or shift.shape != scale.shape or shift.dtype != scale.dtype:
        got = f"{list(x.shape)}, {list(scale.shape)} {scale.dtype} and {list(shift.shape)} {shift.dtype}"
        raise ValueError(f"x must be [B, T, D], scale and shift [B, D] of one type, got {got}")
    require_same_device(x.device, scale=scale, shift=shift)
    if choose(impl, x, scale) == "reference":
        return adaln_reference(x, scale, shift, norm=norm, eps=eps)
    require_fitting_width(x)
    return fused(x, scale, shift, one_plus=True, norm=norm, eps=eps)
