"""The end of one branch of a transformer block and the norm before the next: residual and affine norm in one pass.

    x_new = x + branch, rounded to x's type
    y = norm(x_new) weight + bias                                                [Ba et al. 2016, Eq. 4; Xiong et al. 2020, Pre-LN]

    g = dy weight;   dx = dbranch = dx_new + rstd (g - mean(g) - n mean(g n)), without mean(g) for rms
    dweight = sum over all tokens of dy n;   dbias = sum over all tokens of dy

x, branch, x_new, y are [..., D]; weight, bias [D]; fp32, bf16 or fp16, computed in fp32 (norm.py holds the kernels and the registration).
Bytes per element in bf16: forward 4 read, 4 written; backward 6 read, 2 written, one tensor serving as dx and dbranch. Without a branch
x_new is x itself: forward 2 and 2. Kept for the backward pass: x_new, weight and the statistics in fp32.
"""

import torch
from torch import Tensor

from fasttrain_kernels.arguments import require_float, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.norm import fused_residual, normalised, require_fitting_width, require_norm


def residual_norm_reference(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, *, norm: str = "layer", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x + branch, and norm(x + branch) * weight + bias, in plain torch; the norm is computed in fp32 (float64 for float64 x)."""
    x_new = x if branch is None else x + branch
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return x_new, normalised(x_new.to(wide), norm, eps, weight.to(wide), bias).to(x.dtype)


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Tokens with a branch added, and the same normalised with learned weights.

    x_new = x + branch;   y = norm(x_new) weight + bias                          [Ba et al. 2016, Eq. 4; Xiong et al. 2020, Pre-LN]

    Args:
        x: tokens, [..., D], fp32, bf16 or fp16; the Triton kernel takes D up to 8192.
        branch: what attention or the MLP made of them, x's shape and type; None adds nothing.
        weight: [D], any of these types.
        bias: [D] of weight's type, or None.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        eps: added to the variance, or to the mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        (x_new, y), both of x's shape and type, computed in fp32; y is that of the rounded x_new, which is x without a branch.
        Differentiable in all tensors; the gradients of weight and bias are summed in fp32.

    Raises:
        ValueError: unknown norm; shapes, types or devices disagree; `impl` cannot run here, or D is too wide for it.
    """
    require_norm(norm)
    given = {"branch": branch, "weight": weight, "bias": bias}
    others = {name: tensor for name, tensor in given.items() if tensor is not None}
    require_float(x=x, **others)
    if x.dim() < 1 or weight.shape != x.shape[-1:] or (bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype)):
        rows = " and ".join(f"{list(row.shape)} {row.dtype}" for row in (weight, bias) if row is not None)
        raise ValueError(f"x must be [..., D], weight and bias [D] of one type, got {list(x.shape)}, {rows}")
    if branch is not None and (branch.shape != x.shape or branch.dtype != x.dtype):
        raise ValueError(f"branch must be like x, {list(x.shape)} {x.dtype}, got {list(branch.shape)} {branch.dtype}")
    require_same_device(x.device, **others)
    if choose(impl, x, weight) == "reference":
        return residual_norm_reference(x, branch, weight, bias, norm=norm, eps=eps)
    require_fitting_width(x)
    return fused_residual(x, branch, None, weight, bias, one_plus=False, norm=norm, eps=eps)
