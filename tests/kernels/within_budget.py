"""An operation called in an unusual way, held to the error budget that its ordinary calls keep."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.kernels.calls import budget, errors, gradients, in_float64

Arguments = Mapping[str, Tensor | None]


def require_within_budget(kernel: Callable[..., Any], reference: Callable[..., Any], arguments: Arguments) -> None:
    """Asserts that the kernel's outputs and all gradients are as near those in float64 as twice the reference's, which has its types."""
    given = {name: t for name, t in arguments.items() if t is not None}
    ours, plain = outputs_and_gradients(kernel, arguments), outputs_and_gradients(reference, arguments)
    truth = outputs_and_gradients(reference, {**arguments, **in_float64(given)})
    for value, theirs, exact in zip(ours, plain, truth, strict=True):
        assert value.dtype == theirs.dtype and value.shape == theirs.shape
        assert torch.isfinite(value).all()
        if exact.numel() > 0:
            assert all(error <= allowed for error, allowed in zip(errors(value, exact), budget(theirs, exact), strict=True))


def outputs_and_gradients(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """What function(**arguments) returns, and the gradient of each argument for fixed random upstream gradients."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in arguments.items()}
    returned = function(**leaves)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    return [t.detach() for t in (*outputs, *gradients(outputs, [t for t in leaves.values() if t is not None]))]
