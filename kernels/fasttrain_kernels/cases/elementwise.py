"""Cases of the operations within attention and the MLP: QK norm, bias and GELU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.bias_gelu import bias_gelu, bias_gelu_reference
from fasttrain_kernels.cases.case import Case, Inputs, Shape, randn
from fasttrain_kernels.joint_qk_norm import joint_qk_norm, joint_qk_norm_reference
from fasttrain_kernels.qk_norm import qk_norm, qk_norm_reference

_HEADS = 16


def bias_gelu_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x of `shape` [..., D] that reaches both tails; bias [D]."""
    x = randn(shape, torch.float32, device, 0) * 2
    return {"x": x.to(dtype), "bias": randn(shape[-1:], dtype, device, 1)}


def qk_norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """qkv of `shape` [B, T, 3 h d] for 16 heads; weights [d] around 1; the cosines and sines [T, d/2] of angles up to a full turn."""
    width = shape[2] // (3 * _HEADS)
    angle = torch.linspace(0.0, 6.28, shape[1] * (width // 2), device=device).view(shape[1], width // 2)
    weights = {f"{name}_weight": (1 + 0.5 * randn((width,), torch.float32, device, i)).to(dtype) for i, name in enumerate("qk", 1)}
    return {"qkv": randn(shape, dtype, device, 0), **weights, "cos": angle.cos(), "sin": angle.sin()}


def joint_qk_norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Those of qk_norm for an image of `shape` [B, N, 3 h d], and for a text of its own: 77 tokens beside 256, or one at least."""
    text_shape = (shape[0], max(1, 77 * shape[1] // 256), shape[2])
    image = qk_norm_inputs(shape, dtype, device)
    text = {name: 0.5 - t for name, t in qk_norm_inputs(text_shape, dtype, device).items()}
    own = {f"{name}_{of}": inputs[name] for name in ("qkv", "q_weight", "k_weight") for of, inputs in (("image", image), ("text", text))}
    return {**own, "cos": image["cos"], "sin": image["sin"]}


def with_or_without_angles(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """`function`, one of these two or a reference, with a setting that leaves out the angles which its inputs always hold."""

    def call(*, cos: Tensor, sin: Tensor, rotary: bool, **others: Any) -> tuple[Tensor, ...]:
        angles = {"cos": cos, "sin": sin} if rotary else {}
        return function(heads=_HEADS, **angles, **others)

    return call


ELEMENTWISE_CASES: dict[str, Case] = {
    "bias_gelu": Case(
        reference=bias_gelu_reference,
        call=bias_gelu,
        inputs=bias_gelu_inputs,
        differentiable=("x", "bias"),
        shapes=((5, 3, 384), (2, 4, 768), (1, 3, 1152), (9, 11, 33), (1, 1), (2, 700), (2, 0), (0, 8)),
        sample=(6, 4608),
        real=((256, 3072), (256, 4096), (256, 4608), (256, 6144)),
        minimum=(4, 6),
        options=({"approximate": "none"}, {"approximate": "tanh"}),
    ),
    "qk_norm": Case(
        reference=with_or_without_angles(qk_norm_reference),
        call=with_or_without_angles(qk_norm),
        inputs=qk_norm_inputs,
        differentiable=("qkv", "q_weight", "k_weight"),
        shapes=((5, 3, 96), (2, 4, 3072), (1, 3, 3456), (9, 3, 480), (1, 1, 96), (0, 3, 96), (2, 0, 96)),
        sample=(6, 3456),
        real=((256, 2304), (256, 3072), (256, 3456), (256, 4608)),
        minimum=(8 / 3, 16 / 3),
        smallest=((1, 1, 96),),
        tiny=(1, 2, 192),
        options=({"rotary": False}, {"rotary": True}),
    ),
    "joint_qk_norm": Case(
        reference=with_or_without_angles(joint_qk_norm_reference),
        call=with_or_without_angles(joint_qk_norm),
        inputs=joint_qk_norm_inputs,
        differentiable=("qkv_image", "qkv_text", "q_weight_image", "q_weight_text", "k_weight_image", "k_weight_text"),
        shapes=((5, 7, 96), (2, 4, 3072), (1, 14, 3456), (9, 3, 480), (1, 1, 96), (0, 3, 96), (2, 0, 96)),
        sample=(6, 3456),
        real=((256, 2304), (256, 3072), (256, 3456), (256, 4608)),
        minimum=(4, 16 / 3),
        smallest=((1, 1, 96), (2, 1, 96), (2, 4, 96)),
        tiny=(1, 2, 192),
        counted=("qkv_text",),
        options=({"rotary": False}, {"rotary": True}),
    ),
}
