"""Calling an operation as a test or a benchmark does: outputs and gradients as one list, and how far they may be from the truth."""

from typing import Any, NamedTuple

import torch
from fasttrain_kernels.cases import Case, Inputs
from torch import Tensor

NOISE_ERROR = 2e-6
"""How far a kernel's fp32 normal may be from the specification (philox.py)."""


class Errors(NamedTuple):
    """Absolute errors of one tensor against the truth."""

    largest: float
    mean: float


def outputs_of(call: Any, inputs: Inputs, **options: Any) -> list[Tensor]:
    """What the operation returns, always as a list."""
    output = call(**inputs, **options)
    return [output] if isinstance(output, Tensor) else list(output)


def results(call: Any, inputs: Inputs, case: Case, **options: Any) -> list[Tensor]:
    """All outputs, then the gradient of every differentiable input for fixed random upstream gradients of every output that has one."""
    outputs, leaves = forward(call, inputs, case, **options)
    return [t.detach() for t in (*outputs, *gradients(outputs, leaves))]


def forward(call: Any, inputs: Inputs, case: Case, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs, and the leaves they can be differentiated by."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    return outputs_of(call, {**inputs, **leaves}, **options), list(leaves.values())


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of every leaf."""
    roots = [output for output in outputs if output.requires_grad]
    return torch.autograd.grad(roots, leaves, upstream(roots)) if leaves else ()


def upstream(roots: list[Tensor]) -> list[Tensor]:
    """A fixed random gradient for each root."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(root.shape, generator=generator).to(root) for root in roots]


def in_float64(inputs: Inputs) -> Inputs:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def errors(values: Tensor, truth: Tensor) -> Errors:
    """How far values are from the truth, which is float64 and not empty."""
    error = (values.double() - truth).abs()
    return Errors(error.max().item(), error.mean().item())


def budget(plain: Tensor, truth: Tensor, *, drawn: bool = True) -> Errors:
    """What a kernel may be off by: twice plain PyTorch's errors in the same dtype, and a small floor.

    The floor is for the order of fp32 sums: 8 roundings of the largest value. Where noise is `drawn`, it is for that as well.
    """
    noise = NOISE_ERROR if drawn else 0.0
    floor = (noise + 8 * torch.finfo(torch.float32).eps) * truth.abs().amax().clamp(min=1e-3).item()
    theirs = errors(plain, truth)
    return Errors(2 * theirs.largest + floor, 2 * theirs.mean + floor)
