"""Triton where it is installed; where it is not, just enough of it that the files holding kernels can still be imported."""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl
else:
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the bare function, which nothing launches because `dispatch.choose` never picks it."""
    return triton.jit(function) if HAS_TRITON else function
