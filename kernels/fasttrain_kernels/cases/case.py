"""What a test or a benchmark needs to know of an operation, and random inputs that every device sees alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to call one operation: `call(**inputs, **options, impl=...)` beside `reference(**inputs, **options)`.

    Both return a tensor or a tuple of tensors; those that require a gradient are differentiable in the `differentiable` inputs.
    """

    reference: Callable[..., Any]
    call: Callable[..., Any]
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    differentiable: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Small shapes of the first input: odd sizes, one element, several blocks, batch 1, 2 and 5, and none at all. The second is plain."""
    sample: Shape
    """One sample of the first input in the report of errors: of a real width, small enough for the interpreter."""
    real: tuple[Shape, ...]
    """One sample of the first input at which machine code is read and time is taken."""
    minimum: tuple[float, float]
    """Bytes that each element costs at least in bf16, forward and backward, of the first input and of those `counted` [PERFORMANCE: the
    operation's docstring]."""
    smallest: tuple[Shape, ...] = ((1, 1),)
    """Shapes of which some sizes are one, which a real launch turns into constants."""
    tiny: Shape = (2, 3, 5)
    """A shape on which gradients can be checked by finite differences."""
    counted: tuple[str, ...] = ()
    """Inputs beside the first whose elements `minimum` is about as well."""
    options: tuple[dict[str, Any], ...] = ({},)
    """Settings worth testing, each a set of keyword arguments."""

    def elements(self, inputs: Inputs) -> int:
        """How many elements `minimum` is about."""
        return sum(inputs[name].numel() for name in (next(iter(inputs)), *self.counted))


def randn(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Standard normal numbers, drawn on the CPU so that every device sees the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def draws(batch: int, device: torch.device) -> Inputs:
    """A seed and positions of which all 64 bits count."""
    position = torch.arange(batch, device=device) * (2**32 + 12345) + 7
    return {"seed": torch.tensor(-(2**62) + 0x1234567, device=device), "position": position}
