"""Tensors of more than 2^31 elements without their memory: only the last program of each launch runs, and only its pages are touched.

An operation is called with a batch so large that its first input passes 2^31 elements. The last sample is the last one of a small batch,
so that its results are known; all others are memory that nobody has touched. Launches are recorded, then the last program of each is
interpreted.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from fasttrain_kernels.cases import Case
from torch import Tensor

from tests.kernels.calls import Errors, budget, errors, forward, gradients, in_float64, upstream
from tests.kernels.interpreter import launching_for, recording, run_program
from tests.kernels.passes import BULK, CPU, recorded, tensors_of

SMALL = 2
PROCESSORS = 2**14
"""So many that a program's share of the rows is small."""
ENOUGH = 2**31
TAIL = 8
"""The last elements of a tensor, which the last program writes."""


class Found(NamedTuple):
    """How far the last elements of one huge output or gradient are from the truth, and what they may be off by."""

    error: Errors
    allowed: Errors


def last_elements(case: Case, options: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[Found]:
    """What the last program of every launch, forward and backward, makes of more than 2^31 elements."""
    small = case.inputs((SMALL, *case.sample), dtype, CPU)
    plain_outputs, plain_leaves = forward(case.reference, small, case, **options)
    exact_outputs, exact_leaves = forward(case.reference, in_float64(small), case, **options)
    ends = upstream([output for output in plain_outputs if output.requires_grad])
    batch = ENOUGH // prod(case.sample) + 2
    huge = {name: enlarged(tensor, batch) for name, tensor in small.items()}
    with recording() as launches, launching_for(PROCESSORS):
        outputs, leaves = forward(case.call, huge, case, impl="triton", **options)
        roots = [output for output in outputs if output.requires_grad]
        grads: tuple[Tensor, ...] = ()
        if ends_in_a_kernel(case, options):
            grads = torch.autograd.grad(roots, leaves, [like(root, end) for root, end in zip(roots, ends, strict=True)])
    for launch in launches:
        if any(map(is_bulk, tensors_of(launch).values())):
            run_program(launch, tuple(size - 1 for size in launch.grid))
    plain = [*plain_outputs, *gradients(plain_outputs, plain_leaves)][: len(outputs) + len(grads)]
    exact = [*exact_outputs, *gradients(exact_outputs, exact_leaves)][: len(plain)]
    return [
        Found(errors(tail(ours), tail(true)), budget(theirs.detach(), true.detach()))
        for ours, theirs, true in zip([*outputs, *grads], plain, exact, strict=True)
        if is_bulk(ours)
    ]


def ends_in_a_kernel(case: Case, options: dict[str, Any]) -> bool:
    """Whether the backward pass is a kernel's: one in plain torch would touch everything."""
    return bool(recorded(case, (SMALL, *case.sample), options).backward)


def enlarged(tensor: Tensor, batch: int) -> Tensor:
    """A per-sample tensor of `batch` samples, the last one its own last, the others untouched memory; any other tensor as it is."""
    if tensor.shape[:1] != (SMALL,):
        return tensor
    large = torch.empty((batch, *tensor.shape[1:]), dtype=tensor.dtype)
    large[-1] = tensor[-1]
    return large


def like(root: Tensor, end: Tensor) -> Tensor:
    """An upstream gradient of a huge output, laid out as it is, whose last sample is that of `end`."""
    gradient = torch.empty_like(root)
    gradient[-1] = end[-1]
    return gradient


def is_bulk(tensor: Tensor) -> bool:
    return tensor.numel() * BULK >= ENOUGH


def tail(tensor: Tensor) -> Tensor:
    """The last elements of the last sample."""
    return tensor[-1].detach().flatten()[-TAIL:]
