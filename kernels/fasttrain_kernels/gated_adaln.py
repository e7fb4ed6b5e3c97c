"""The end of one branch of a DiT block and the norm before the next: gate, residual and adaptive layer norm in one pass.

    x_new = x + gate_b branch, rounded to x's type
    y = norm(x_new) (1 + scale_b) + shift_b                                      [Peebles and Xie 2023, section 3.2, adaLN-Zero]

    dx = dx_new + the gradient that adaln passes down to x_new;   dbranch = gate_b dx;   dgate_b = sum over tokens of dx branch
    dscale_b, dshift_b as in adaln.py, of norm(x_new)

x, branch, x_new, y are [B, T, D]; gate, scale, shift [B, D], rows of a wider matrix allowed; fp32, bf16 or fp16, computed in fp32
(norm.py holds the kernels and the registration). Bytes per element in bf16: forward 4 read, 4 written; backward 8 read, 4 written. One
kernel after the other they would be 10 and 18. Kept for the backward pass: x_new, branch, gate, scale and the statistics in fp32.
Where x_new is not used again, its gradient is not read (under torch.compile it is: as zeros).
"""

import torch
from torch import Tensor

from fasttrain_kernels.adaln import adaln_reference
from fasttrain_kernels.arguments import require_float, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.norm import fused_residual, require_fitting_width, require_norm


def gated_adaln_reference(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and adaln of it, in plain torch, computed in fp32 (float64 for float64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_new = (x.to(wide) + gate.to(wide)[:, None] * branch.to(wide)).to(x.dtype)
    return x_new, adaln_reference(x_new, scale, shift, norm=norm, eps=eps)


def gated_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Tokens with a gated branch added, and the same normalised, scaled and shifted by their sample's modulation.

    x_new = x + gate branch;   y = norm(x_new) (1 + scale) + shift               [Peebles and Xie 2023, section 3.2, adaLN-Zero]

    Args:
        x: tokens, [B, T, D], fp32, bf16 or fp16; the Triton kernel takes D up to 8192.
        branch: what attention or the MLP made of them, x's shape and type.
        gate, scale, shift: [B, D], of one type, any of these; rows of a wider matrix (a chunk of it) are read in place.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm), neither with weights.
        eps: added to the variance, or to the mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        (x_new, y), both [B, T, D] of x's type, computed in fp32; y is that of the rounded x_new. Differentiable in all five tensors.

    Raises:
        ValueError: unknown norm; shapes, types or devices disagree; `impl` cannot run here, or D is too wide for it.
    """
    require_norm(norm)
    rows = {"gate": gate, "scale": scale, "shift": shift}
    require_float(x=x, branch=branch, **rows)
    if x.dim() != 3 or branch.shape != x.shape or branch.dtype != x.dtype:
        got = f"{list(x.shape)} {x.dtype} and {list(branch.shape)} {branch.dtype}"
        raise ValueError(f"x and branch must be [B, T, D] of one type, got {got}")
    if any(row.shape != (x.shape[0], x.shape[2]) or row.dtype != gate.dtype for row in rows.values()):
        got = ", ".join(f"{list(row.shape)} {row.dtype}" for row in rows.values())
        raise ValueError(f"gate, scale and shift must be [B, D] of one type beside x {list(x.shape)}, got {got}")
    require_same_device(x.device, branch=branch, **rows)
    if choose(impl, x, gate) == "reference":
        return gated_adaln_reference(x, branch, gate, scale, shift, norm=norm, eps=eps)
    require_fitting_width(x)
    return fused_residual(x, branch, gate, scale, shift, one_plus=True, norm=norm, eps=eps)
