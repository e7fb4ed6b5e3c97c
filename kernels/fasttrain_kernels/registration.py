"""Launchers as operations of torch.library: what torch.compile, FakeTensor and CUDA graphs see of a kernel.

An operation here computes and knows no gradient; a plain `torch.autograd.Function` around a forward and a backward operation does. That
is one path for eager and for compiled code, and the cheapest: `torch.library.custom_op` with `register_autograd` costs about 1.8 times as
much for a forward and a backward call that do nothing, 56 instead of 31 microseconds on one CPU (`pytest benchmarks -k registration`).
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fasttrain"


def operation(name: str, *, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers the decorated launcher as `torch.ops.fasttrain.<name>`, which replaces it.

    Args:
        name: of the operation.
        fake: the same arguments -> tensors of the results' shapes, types and devices, not computed.
        mutates: the arguments that the launcher writes to; results never share memory with arguments.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, torch.library.infer_schema(launcher, mutates_args=mutates))
        torch.library.impl(qualified, "CompositeExplicitAutograd", launcher)
        torch.library.register_fake(qualified, fake)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register
