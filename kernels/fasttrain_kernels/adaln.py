"""Adaptive layer norm: LayerNorm or RMSNorm without weights, then each sample's own scale and shift."""

from torch import Tensor
import torch
from torch.nn import functional as F


def adaln_reference(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6) -> Tensor:
    """norm(x) * (1 + scale) + shift in plain torch, computed in fp32 (float64 for float64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normalise = F.layer_norm if norm == "layer" else F.rms_norm
    normed = normalise(x.to(wide), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(x.dtype)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6, impl: str = "auto") -> Tensor:
    return adaln_reference(x, scale, shift, norm=norm, eps=eps)
