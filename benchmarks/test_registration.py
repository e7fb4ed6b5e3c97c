"""What the boundary of torch.library costs an eager call: registration.py's way beside `custom_op` with `register_autograd`.

    pytest benchmarks -k registration

Both do nothing but make the tensors that a norm would: forward, then backward, on 32 numbers. The difference is the boundary's.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fasttrain_kernels.registration import operation
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

Call = Callable[[Tensor], Tensor]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _by_function() -> Call:
    forward, backward = (operation(f"nothing_{part}", fake=_like)(_like) for part in ("forward", "backward"))

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return backward(dy)

    return Nothing.apply


def _by_custom_op() -> Call:
    forward, backward = (torch.library.custom_op(f"fasttrain::nothing_custom_{part}", _like, mutates_args=()) for part in ("f", "b"))
    forward.register_fake(_like)
    backward.register_fake(_like)
    forward.register_autograd(lambda ctx, dy: backward(dy), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return forward


@pytest.mark.parametrize("way", [_by_function, _by_custom_op])
def test_registration(way: Callable[[], Call], benchmark: BenchmarkFixture) -> None:
    call, x = way(), torch.randn(32, requires_grad=True)
    dy = torch.ones(32)
    benchmark.group = "forward and backward of nothing"
    benchmark(lambda: torch.autograd.grad(call(x), x, dy))
