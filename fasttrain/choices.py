"""Which implementation computes each part of a run: kernels and attention as its config asks, checked, chosen and told at its start."""

import os
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from fasttrain_kernels.dispatch import IMPLEMENTATIONS, OPERATIONS, Kernels, choose, here
from pydantic import PlainSerializer, PlainValidator
from torch import Tensor

from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.models import Transformer
from fasttrain.models.attention_choice import Shape, deterministic_choice, fastest, obstacle
from fasttrain.registry import nearest, shown

DEFAULT = "default"


def read_kernels(given: Any) -> Kernels:
    """`kernels` of a config: one implementation for all operations, or a mapping with `default` and exceptions by operation.

    Raises:
        ValueError: an unknown implementation or operation, with the nearest known one.
    """
    if isinstance(given, Kernels):
        return given
    table = dict(given) if isinstance(given, Mapping) else {DEFAULT: given}
    for operation, impl in table.items():
        if operation not in (DEFAULT, *OPERATIONS):
            raise ValueError(f"unknown operation {shown(operation)}; {nearest(operation, (DEFAULT, *OPERATIONS))}")
        if impl not in IMPLEMENTATIONS:
            told = "" if operation == DEFAULT else f" for {operation}"
            raise ValueError(f"unknown implementation {shown(impl)}{told}; the choices are: {', '.join(IMPLEMENTATIONS)}")
    return Kernels(table.pop(DEFAULT, "auto"), table)


def plain_kernels(kernels: Kernels) -> str | dict[str, str]:
    """What `read_kernels` reads back, as short as it can be."""
    return {DEFAULT: kernels.default, **kernels.overrides} if kernels.overrides else kernels.default


KernelChoice = Annotated[Kernels, PlainValidator(read_kernels), PlainSerializer(plain_kernels)]
"""The type of a config's key `kernels`."""


def check_kernels(kernels: Kernels, seed: Tensor) -> None:
    """Refuses what cannot run on the device of `seed`.

    Raises:
        UserError: names the key and the obstacle.
    """
    for key, impl in (("kernels", kernels.default), *((f"kernels.{name}", impl) for name, impl in kernels.overrides.items())):
        try:
            choose(impl, seed)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None


def describe_kernels(kernels: Kernels) -> str:
    """What each operation uses: one word where all use the same, and the others by name."""
    used = {operation: uses(kernels, operation) for operation in OPERATIONS}
    groups: dict[str, list[str]] = {}
    for operation, impl in used.items():
        groups.setdefault(impl, []).append(operation)
    (common, _), *others = sorted(groups.items(), key=lambda group: -len(group[1]))
    return ", ".join([f"{common} for all {len(used)}" if not others else common, *(f"{impl} for {', '.join(ops)}" for impl, ops in others)])


def uses(kernels: Kernels, operation: str) -> str:
    """What one operation uses on this machine, and why."""
    return here() if kernels.of(operation) == "auto" else f"{kernels.of(operation)} (asked for)"


def choose_attention(
    wanted: str, model: Transformer, micro_batch: int, dtype: torch.dtype, processes: Processes, *, deterministic: bool, compiled: bool
) -> tuple[str, str]:
    """The attention of a run, and one line about it. A collective where it is measured: rank 0 measures, and all follow.

    Raises:
        UserError: the attention asked for cannot run forward and backward here.
    """
    shape, device = Shape(micro_batch, model.heads, model.tokens, model.head_width, dtype, model.ragged_tokens), processes.device
    if wanted != "auto":
        found = obstacle(wanted, shape, device, deterministic=deterministic, compiled=compiled)
        if found is not None:
            raise UserError(f"attention: {wanted} cannot run at {shape} on {device.type}: {found}; use attention: auto, or another one")
        return wanted, f"{wanted} (asked for)"
    if deterministic:
        chosen = deterministic_choice(shape, device)
        return chosen, "torch's on a CPU" if chosen == "auto" else f"{chosen}, for the same bits each time"
    chosen, seconds = processes.from_main(fastest(shape, device, compiled=compiled) if processes.is_main else None)
    if not seconds:
        return chosen, "torch scaled_dot_product_attention, its own choice"
    times = ", ".join(f"{name} {1e6 * time:.0f}" for name, time in sorted(seconds.items(), key=lambda item: item[1]))
    return chosen, f"{chosen}, the fastest at {shape} (microseconds forward and backward: {times})"


def make_deterministic() -> None:
    """Makes this process give the same bits each time it computes the same: torch's deterministic algorithms, and cuBLAS's workspace.

    Where torch has no deterministic form of an operation, it says so and stops.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, before the first product
    torch.use_deterministic_algorithms(True)
    # Memory that is written before it is read, as every kernel's test shows, need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
