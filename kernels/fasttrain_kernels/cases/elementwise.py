"""Cases of the operations within attention and the MLP: QK norm, bias and GELU."""

import torch

from fasttrain_kernels.bias_gelu import bias_gelu, bias_gelu_reference
from fasttrain_kernels.cases.case import Case, Inputs, Shape, randn


def bias_gelu_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x of `shape` [..., D] that reaches both tails; bias [D]."""
    x = randn(shape, torch.float32, device, 0) * 2
    return {"x": x.to(dtype), "bias": randn(shape[-1:], dtype, device, 1)}


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
}
