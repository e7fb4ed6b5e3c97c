"""What a launch's loads and stores touch in the interpreter: bytes moved for each argument, and nothing outside the arguments.

Only active lanes count, and an address that several lanes of one access share counts once, as a GPU fetches it once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

ELSEWHERE = "tensors reached through a table of addresses"


@dataclass
class Traffic:
    """Bytes moved between the kernel and one tensor."""

    read: int = 0
    written: int = 0


@dataclass
class Memory:
    """The memory that one launch may touch: that of its tensors, each known by its argument's name.

    An access outside is refused before it happens, unless the kernel takes addresses from a table: then it cannot be judged.
    """

    arguments: Mapping[str, Any]
    counting: bool = False
    traffic: dict[str, Traffic] = field(default_factory=dict)
    through_addresses: bool = False

    def __post_init__(self) -> None:
        self._ranges = [(tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name) for name, tensor in _tensors(self.arguments)]

    def touch(self, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle, kind: str) -> None:
        """Takes note of one access, `kind` "read" or "written"."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if active.size == 0:
            return
        name = self._owner(int(active.min()), int(active.max()) + size)
        if self.counting:
            found = self.traffic.setdefault(name, Traffic())
            setattr(found, kind, getattr(found, kind) + np.unique(active).size * size)

    def _owner(self, first: int, end: int) -> str:
        """The argument that holds these addresses; of several that overlap, the smallest."""
        owners = [(stop - start, name) for start, stop, name in self._ranges if start <= first and end <= stop]
        if owners:
            return min(owners)[1]
        if self.through_addresses:
            return ELSEWHERE
        raise IndexError(f"an access to {first:#x}..{end:#x} is outside every argument: {self._ranges}")


def watched(running: list[Memory]) -> dict[str, Callable[..., Any]]:
    """Replacements for the interpreter's memory operations by name; each tells the launch that is running, the last, what it will touch."""
    builder = interpreter.InterpreterBuilder
    load, store, from_integer = builder.create_masked_load, builder.create_masked_store, builder.create_int_to_ptr
    swap, change = builder.create_atomic_cas, builder.create_atomic_rmw

    def tell(pointers: Any, mask: Any, *kinds: str) -> None:
        for memory in running[-1:]:
            for kind in kinds:
                memory.touch(pointers, mask, kind)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        tell(pointers, mask, "read")
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        tell(pointers, mask, "written")
        return store(self, pointers, value, mask, *rest)

    def noted_cast(self: Any, *values: Any) -> Any:
        for memory in running[-1:]:
            memory.through_addresses = True
        return from_integer(self, *values)

    def watched_swap(self: Any, pointers: Any, *rest: Any) -> Any:
        tell(pointers, interpreter.TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1), "read", "written")
        return swap(self, pointers, *rest)

    def watched_change(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        tell(pointers, mask, "read", "written")
        return change(self, operation, pointers, value, mask, *rest)

    return {
        "create_masked_load": watched_load,
        "create_masked_store": watched_store,
        "create_int_to_ptr": noted_cast,
        "create_atomic_cas": watched_swap,
        "create_atomic_rmw": watched_change,
    }


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from ((name, element) for element in value if isinstance(element, torch.Tensor))


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()
