"""RMS norm of the queries and keys of text and image, each read from its own packed qkv matrix, into one sequence for joint attention.

    q = (rms(q_text) weight_text, rotate(rms(q_image) weight_image)), k alike, v = (v_text, v_image)   [Esser et al. 2024, Figure 2]

with rms, rotate and their gradients as in qk_norm.py. The text's M tokens come first, and only the image's N are turned. Both matrices may
be views, as in qk_norm; q, k and v are written once, [B, M + N, h, d] in memory. Their gradients are read where attention left them, be it
[B, T, h, d] or [B, h, T, d]; only if the three lie in different ways, or not in whole heads, are they copied first.

Bytes per element of both qkv in bf16: 4 forward, 16/3 backward (q and k 6, v 4). Two calls of qk_norm and three of torch.cat move 20/3
forward, because q and k are written, read and written again and v is read and written; and as many as here backward, in twice the
launches. Kept for the backward pass: both qkv, the weights, cos and sin; rstd is computed again, as in qk_norm. A program works on text or
on image, so that one launch does both and neither waits for the other. In the backward pass it writes fp32 sums [2, 2, d] for the four
weights, zeros for those of the other sequence, which are read again in fixed order: 0.5 MB for 132 processors and d = 72, either way.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttrain_kernels.arguments import require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.joint_qk_norm_kernels import joint_qk_norm_backward_kernel, joint_qk_norm_forward_kernel
from fasttrain_kernels.language import triton
from fasttrain_kernels.partial_sums import sum_rows
from fasttrain_kernels.qk_norm import qk_norm_reference, require_angles, require_heads
from fasttrain_kernels.qk_norm_kernels import (
    backward_programs,
    constants,
    contiguous,
    in_whole_heads,
    require_room,
    strides_in_heads,
    tile_rows,
)
from fasttrain_kernels.registration import operation


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


def _outputs(qkv_text: Tensor, qkv_image: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, text_tokens, packed = qkv_text.shape
    shape = (batch, text_tokens + qkv_image.shape[1], heads, packed // (3 * heads))
    q, k, v = (torch.empty(shape, dtype=qkv_text.dtype, device=qkv_text.device) for _ in range(3))
    return q, k, v


def _fake_outputs(qkv_text, qkv_image, q_weight_text, k_weight_text, q_weight_image, k_weight_image, cos, sin, heads, eps):
    return _outputs(qkv_text, qkv_image, heads)


def _tiles(qkv_text: Tensor, qkv_image: Tensor, heads: int, tile: int) -> int:
    """How many tiles both sequences are cut into; none holds rows of both."""
    return sum(triton.cdiv(qkv.shape[0] * qkv.shape[1] * heads, tile) for qkv in (qkv_text, qkv_image))


@operation("joint_qk_norm", fake=_fake_outputs)
def _joint_qk_norm_op(
    qkv_text: Tensor,
    qkv_image: Tensor,
    q_weight_text: Tensor,
    k_weight_text: Tensor,
    q_weight_image: Tensor,
    k_weight_image: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, width = _outputs(qkv_text, qkv_image, heads), q_weight_text.shape[0]
    if outputs[0].numel() > 0:
        (text,), (image,) = in_whole_heads(width, qkv_text), in_whole_heads(width, qkv_image)
        others = contiguous(q_weight_text, k_weight_text, q_weight_image, k_weight_image, cos, sin)
        sizes = [*text.shape[:2], image.shape[1]]
        strides = [*strides_in_heads(text, width), *strides_in_heads(image, width)]
        programs = _tiles(text, image, heads, tile_rows(heads, width))
        with torch.cuda.device_of(text):
            joint_qk_norm_forward_kernel[programs,](text, image, *others, *outputs, *sizes, *strides, eps, **constants(heads, width))
    return outputs


def _empty_gradients(qkv_text: Tensor, qkv_image: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtext, dimage = (torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) for qkv in (qkv_text, qkv_image))
    return dtext, dimage, torch.empty((2, 2, *weight.shape), dtype=weight.dtype, device=weight.device)


@operation("joint_qk_norm_backward", fake=lambda dq, dk, dv, qkv_text, qkv_image, weight, *_: _empty_gradients(qkv_text, qkv_image, weight))
def _joint_qk_norm_backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    qkv_text: Tensor,
    qkv_image: Tensor,
    q_weight_text: Tensor,
    k_weight_text: Tensor,
    q_weight_image: Tensor,
    k_weight_image: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtext, dimage, dweights = _empty_gradients(qkv_text, qkv_image, q_weight_text)
    if dq.numel() == 0:
        return dtext, dimage, dweights.zero_()
    width = q_weight_text.shape[0]
    grads, (text,), (image,) = in_whole_heads(width, dq, dk, dv), in_whole_heads(width, qkv_text), in_whole_heads(width, qkv_image)
    others = contiguous(q_weight_text, k_weight_text, q_weight_image, k_weight_image, cos, sin)
    tile, most = tile_rows(heads, width), backward_programs(dq.device)
    # One program less than there may be: the last ones of text and of image may both have less than their share.
    share = triton.cdiv(_tiles(text, image, heads, tile), most - 1) * tile
    sums = torch.empty((_tiles(text, image, heads, share), *dweights.shape), dtype=torch.float32, device=dq.device)
    sizes = [*text.shape[:2], image.shape[1], share]
    strides = [stride for t in (text, image, grads[0]) for stride in strides_in_heads(t, width)]
    with torch.cuda.device_of(text):
        joint_qk_norm_backward_kernel[sums.shape[0],](
            *grads, text, image, *others, dtext, dimage, sums, *sizes, *strides, eps, **constants(heads, width)
        )
    return dtext, dimage, sum_rows(sums, q_weight_text.dtype)


class _JointQkNorm(torch.autograd.Function):
    """Both matrices and all weights as one operation of autograd."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:8])
        ctx.settings = arguments[8:]
        ctx.set_materialize_grads(False)
        return _joint_qk_norm_op(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        some = next(grad for grad in (dq, dk, dv) if grad is not None)
        dq, dk = (torch.zeros_like(some) if grad is None else grad for grad in (dq, dk))
        dtext, dimage, dweights = _joint_qk_norm_backward_op(dq, dk, dv, *ctx.saved_tensors, *ctx.settings)
        return dtext, dimage, *dweights.flatten(0, 1), None, None, None, None


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
    weights = (q_weight_text, k_weight_text, q_weight_image, k_weight_image)
    _require_sequences(qkv_text, qkv_image, weights, heads)
    require_angles(qkv_image, q_weight_image, cos, sin)
    if choose(impl, qkv_text, q_weight_text) == "reference":
        return joint_qk_norm_reference(qkv_text, qkv_image, *weights, heads=heads, cos=cos, sin=sin, eps=eps)
    require_room(heads, q_weight_text.shape[0], qkv_text=qkv_text, qkv_image=qkv_image)
    q, k, v = _JointQkNorm.apply(qkv_text, qkv_image, *weights, cos, sin, heads, eps)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _require_sequences(qkv_text: Tensor, qkv_image: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], heads: int) -> None:
    require_heads(qkv_text, *weights[:2], heads, "_text")
    require_heads(qkv_image, *weights[2:], heads, "_image")
    require_same_device(qkv_image.device, qkv_text=qkv_text)
    for what, text, image in (("qkv", qkv_text, qkv_image), ("weights", weights[0], weights[2])):
        if text.dtype != image.dtype:
            raise ValueError(f"the {what} of text and image must be of one type, got {text.dtype} and {image.dtype}")
    if qkv_text.shape[::2] != qkv_image.shape[::2]:
        raise ValueError(f"qkv_text and qkv_image may differ in tokens only, got {list(qkv_text.shape)} and {list(qkv_image.shape)}")
