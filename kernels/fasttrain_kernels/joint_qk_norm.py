"""RMS norm of the queries and keys of text and image, each read from its own packed qkv matrix, into one sequence for joint attention.

    q = (rms(q_text) weight_text, rotate(rms(q_image) weight_image)), k alike, v = (v_text, v_image)   [Esser et al. 2024, Figure 2]

with rms and rotate of qk_norm.py. The text's tokens come first, and only the image's are turned.
"""

import torch
from torch import Tensor

from fasttrain_kernels.arguments import require_same_device
from fasttrain_kernels.qk_norm import qk_norm_reference, require_angles, require_heads


def joint_qk_norm_reference(
    qkv_text: Tensor,
    qkv_image: Tensor,
    q_weight_text: Tensor,
    k_weight_text: Tensor,
    q_weight_image: Tensor,
    k_weight_image: Tensor,
    *,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) in plain torch: both sequences as qk_norm has them, one behind the other."""
    text = qk_norm_reference(qkv_text, q_weight_text, k_weight_text, heads=heads, eps=eps)
    image = qk_norm_reference(qkv_image, q_weight_image, k_weight_image, heads=heads, cos=cos, sin=sin, eps=eps)
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))  # 3 x [B, h, M + N, d]
    return q, k, v


def joint_qk_norm(
    qkv_text: Tensor,
    qkv_image: Tensor,
    q_weight_text: Tensor,
    k_weight_text: Tensor,
    q_weight_image: Tensor,
    k_weight_image: Tensor,
    *,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of text and image as one sequence, queries and keys normalised per head with their own weights.

    q = (x_text / rms(x_text) weight_text, rotate(x_image / rms(x_image) weight_image))      [Esser et al. 2024, Figure 2]

    Args:
        qkv_text: [B, M, 3 h d], fp32, bf16 or fp16: q, k and v of the text, each h heads of d elements.
        qkv_image: [B, N, 3 h d] of the same type; M and N may be 0.
        q_weight_text, k_weight_text, q_weight_image, k_weight_image: [d], of one type, any of these.
        heads: h.
        cos, sin: [N, d/2], fp32 or another float type, both or neither, of the angle by which each pair of adjacent elements of the
            image's queries and keys is turned; d must be even.
        eps: added to the mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        (q, k, v), each [B, h, M + N, d] of the inputs' type, the text's tokens first: q and k computed in fp32 and rounded once, v
        copied. Differentiable in both qkv and the weights; the weights' gradients are summed in fp32.

    Raises:
        ValueError: shapes, types or devices disagree; one of cos and sin is missing, or wants a gradient, or d is odd; `impl` cannot run
            here, or d is too wide or B (M + N) h too large for it.
    """
    inputs = (qkv_text, qkv_image, q_weight_text, k_weight_text, q_weight_image, k_weight_image)
    _require_sequences(*inputs, heads)
    require_angles(qkv_image, q_weight_image, cos, sin)
    if impl == "triton":
        raise ValueError("impl='triton' cannot run here: joint_qk_norm has no kernel yet; use impl='auto' or impl='reference'")
    return joint_qk_norm_reference(*inputs, heads=heads, cos=cos, sin=sin, eps=eps)


def _require_sequences(
    qkv_text: Tensor,
    qkv_image: Tensor,
    q_weight_text: Tensor,
    k_weight_text: Tensor,
    q_weight_image: Tensor,
    k_weight_image: Tensor,
    heads: int,
) -> None:
    require_heads(qkv_text, q_weight_text, k_weight_text, heads, "_text")
    require_heads(qkv_image, q_weight_image, k_weight_image, heads, "_image")
    require_same_device(qkv_image.device, qkv_text=qkv_text)
    for what, text, image in (("batch", qkv_text.shape[0], qkv_image.shape[0]), ("width", qkv_text.shape[2], qkv_image.shape[2])):
        if text != image:
            raise ValueError(f"qkv_text and qkv_image must have the same {what}, got {list(qkv_text.shape)} and {list(qkv_image.shape)}")
    for what, text, image in (("qkv", qkv_text.dtype, qkv_image.dtype), ("weights", q_weight_text.dtype, q_weight_image.dtype)):
        if text != image:
            raise ValueError(f"{what} of text and image must be of one type, got {text} and {image}")
