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
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    outputs = outputs_of(call, {**inputs, **leaves}, **options)
    roots = [output for output in outputs if output.requires_grad]
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(root.shape, generator=generator).to(root) for root in roots]
    gradients = torch.autograd.grad(roots, list(leaves.values()), upstream) if leaves else ()
    return [t.detach() for t in (*outputs, *gradients)]


def in_float64(inputs: Inputs) -> Inputs:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def errors(values: Tensor, truth: Tensor) -> Errors:
    """How far values are from the truth, which is float64 and not empty."""
    error = (values.double() - truth).abs()
    return Errors(error.max().item(), error.mean().item())


def budget(plain: Tensor, truth: Tensor) -> Errors:
    """What a kernel may be off by: twice plain PyTorch's errors in the same dtype, and a small floor for the order of fp32 sums."""
    floor = (NOISE_ERROR + 8 * torch.finfo(torch.float32).eps) * truth.abs().amax().clamp(min=1e-3).item()
    theirs = errors(plain, truth)
    return Errors(2 * theirs.largest + floor, 2 * theirs.mean + floor)
