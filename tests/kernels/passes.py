"""What the forward and the backward pass of an operation launch, and what each launch's tensors are to the operation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from fasttrain_kernels.cases import Case, Shape
from torch import Tensor

from tests.kernels.calls import forward, gradients
from tests.kernels.interpreter import Launch, interpreting, launching_for, recording
from tests.kernels.memory import ELSEWHERE

CPU = torch.device("cpu")
BULK = 4
"""A tensor is in bulk if it has at least a quarter as many elements as the operation's first input; rows and statistics have fewer."""


@dataclass(frozen=True)
class Passes:
    """The launches of one call and of its gradients, and the number of elements that the operation's minimum of bytes is about."""

    elements: int
    inputs: list[Tensor]
    forward: list[Launch]
    backward: list[Launch]

    def __iter__(self) -> Iterator[tuple[str, list[Launch]]]:
        return iter([("forward", self.forward), ("backward", self.backward)])

    def bulk(self, launch: Launch) -> set[str]:
        """The arguments in bulk: what the minimum of bytes is about."""
        large = {name for name, tensor in tensors_of(launch).items() if tensor.numel() * BULK >= self.inputs[0].numel()}
        return large - self.partial_sums(launch)

    def partial_sums(self, launch: Launch) -> set[str]:
        """The arguments by which launches of one pass hand sums on: in fp32, in several of them, and none of the inputs."""
        found = set()
        for name, tensor in tensors_of(launch).items():
            own = tensor.dtype == torch.float32 and not any(tensor.data_ptr() == other.data_ptr() for other in self.inputs)
            for _, launches in self:
                if own and sum(_has(other, tensor) for other in launches) > 1:
                    found.add(name)
        return found

    def bulk_bytes(self, launches: list[Launch]) -> int:
        """What counted launches move between kernels and tensors in bulk."""
        return sum(
            traffic.read + traffic.written
            for launch in launches
            for name, traffic in launch.traffic.items()
            if name in self.bulk(launch) or name == ELSEWHERE
        )


def worth_counting(sample: Shape) -> Shape:
    """A first input with this sample's rows, few enough for the interpreter, and more of them than rows of modulation or their sums."""
    if len(sample) == 2:
        return (2, 4 * BULK, sample[1])
    if len(sample) == 1:
        return (2, min(sample[0], 8192))
    return (max(2, 256 // prod(sample)), *sample)


def tensors_of(launch: Launch) -> dict[str, Tensor]:
    return {name: value for name, value in launch.bound().items() if isinstance(value, Tensor)}


def _has(launch: Launch, tensor: Tensor) -> bool:
    return any(tensor.data_ptr() == other.data_ptr() for other in tensors_of(launch).values())


def recorded(
    case: Case, shape: Shape, options: dict[str, Any], dtype: torch.dtype = torch.bfloat16, processors: int | None = None
) -> Passes:
    """What would be launched, on a GPU of so many processors if their number is given."""
    return _passes(recording(), nullcontext() if processors is None else launching_for(processors), case, shape, options, dtype)


def counted(case: Case, shape: Shape, options: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Passes:
    """What is launched, interpreted, each launch with its traffic."""
    return _passes(interpreting(counting=True), nullcontext(), case, shape, options, dtype)


def _passes(
    launching: AbstractContextManager[list[Launch]],
    place: AbstractContextManager[None],
    case: Case,
    shape: Shape,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> Passes:
    inputs = case.inputs(shape, dtype, CPU)
    with launching as launches, place:
        outputs, leaves = forward(case.call, inputs, case, impl="triton", **options)
        ahead = len(launches)
        gradients(outputs, leaves)
    return Passes(case.elements(inputs), list(inputs.values()), launches[:ahead], launches[ahead:])
