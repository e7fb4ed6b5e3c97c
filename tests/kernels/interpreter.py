"""Triton's interpreter as a stand-in for a GPU, inside one test: with a GPU's rounding, and nothing left behind afterwards.

Stock Triton decides at import between compiling and interpreting, so one process can do only one of them. Here kernels stay
compilable; within `interpreting()` their launches go to the interpreter, within `recording()` to a list, from which `run_program`
takes single programs. Accesses outside a launch's arguments, which stock Triton lets through, are refused (memory.py).
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from fasttrain_kernels import dispatch
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from tests.kernels.memory import Memory, Traffic, watched


@dataclass
class Launch:
    """One kernel launch: what the launcher passed."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    """Argument -> bytes moved, where the interpreter was asked to count them."""

    def bound(self) -> dict[str, Any]:
        """Argument name -> value, for the kernel's own parameters."""
        own = {name: value for name, value in self.settings.items() if name in self.kernel.arg_names}
        return inspect.signature(self.kernel.fn).bind(*self.args, **own).arguments

    def options(self) -> dict[str, Any]:
        """Compiler options, such as num_warps."""
        return {name: value for name, value in self.settings.items() if name not in self.kernel.arg_names}


@contextmanager
def interpreting(counting: bool = False) -> Iterator[list[Launch]]:
    """Kernel launches, on CPU tensors too, run in the interpreter; gives the list of launches made, `counting` with their traffic."""
    launches: list[Launch] = []

    with _patched_interpreter() as execute, pytest.MonkeyPatch.context() as patch:

        def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **settings: Any) -> None:
            launches.append(Launch(self, grid, args, settings))
            execute(launches[-1], counting)

        patch.setattr(dispatch, "INTERPRETED", True)
        patch.setattr(JITFunction, "run", run)
        yield launches


def run_program(launch: Launch, indices: tuple[int, ...], counting: bool = False) -> None:
    """Interprets one program of a recorded launch: what it touches of huge tensors is all that costs time or memory."""
    # Where the other programs have not run, memory holds anything.
    with _patched_interpreter() as execute, pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        whole, one = ((*sizes, *[filler] * (3 - len(sizes))) for sizes, filler in ((launch.grid, 1), (indices, 0)))
        patch.setattr(interpreter.InterpreterBuilder, "set_grid_dim", lambda self, *_: setattr(self, "grid_dim", whole))
        patch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", one))
        execute(launch, counting, grid=(1,))


@contextmanager
def _patched_interpreter() -> Iterator[Callable[..., None]]:
    """Gives the function that executes a launch in the interpreter, with a GPU's rounding and every access watched."""
    running: list[Memory] = []

    def execute(launch: Launch, counting: bool, grid: tuple[int, ...] | None = None) -> None:
        running.append(Memory(launch.bound(), counting, launch.traffic))
        try:
            _interpreted(launch.kernel.fn).run(*launch.args, grid=grid or launch.grid, warmup=False, **launch.settings)
        finally:
            running.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__call__", lambda self, *args, **kwargs: _interpreted(self.fn).rewrite()(*args, **kwargs))
        patch.setattr(interpreter, "_patch_lang_tensor", _with_index(interpreter._patch_lang_tensor))
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast)
        patch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", lambda self, source, to, _mode: _cast(self, source, to))
        patch.setattr(interpreter.InterpreterBuilder, "binary_op", _refuse_bf16(interpreter.InterpreterBuilder.binary_op))
        for name, replacement in watched(running).items():
            patch.setattr(interpreter.InterpreterBuilder, name, replacement)
        yield execute


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Kernel launches are listed and not run: what they would have written is whatever their memory held before.

    Not for what uses it as an index, which then fails by chance.
    """
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **settings: Any) -> None:
        launches.append(Launch(self, grid, args, settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "INTERPRETED", True)
        patch.setattr(JITFunction, "run", run)
        yield launches


@contextmanager
def launching_for(processors: int) -> Iterator[None]:
    """Launchers choose grids as on a GPU of so many processors, for tensors that are on the CPU; for use with the above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        patch.setattr(dispatch, "_unsupported", lambda device: None)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=processors))
        for name, module in list(sys.modules.items()):
            if name.startswith("fasttrain_kernels.") and hasattr(module, "processors"):
                patch.setattr(module, "processors", lambda device: processors)
        yield


class _Rewriter(interpreter.FunctionRewriter):
    """Rewrites a kernel for the interpreter in a copy of its globals, where stock Triton adds names to the kernel's own module.

    The copy shows both of Triton's language modules, so that one patch per grid covers the library functions a kernel calls.
    """

    def _compile_and_exec(self, transformed_ast: Any) -> Callable[..., Any]:
        code = compile(transformed_ast, filename=self.filename, mode="exec")
        scope = {**vars(interpreter), **self.fn.__globals__, "_shown": tl, "_also_shown": tl.core}
        exec(code, scope)
        return scope[self.fn.__name__]


@functools.cache
def _interpreted(source: Callable[..., Any]) -> interpreter.InterpretedFunction:
    function = interpreter.InterpretedFunction(source)
    function.rewriter = _Rewriter(source)
    return function


def _cast(self: Any, source: interpreter.TensorHandle, to: tl.dtype) -> interpreter.TensorHandle:
    """A conversion between types rounded to nearest even, as GPUs do; stock Triton cuts fp32 to bf16 off."""
    before, after = source.dtype.scalar, to.scalar
    data = source.data
    if before == tl.bfloat16:
        data = torch.from_numpy(np.ascontiguousarray(data).view(np.int16)).view(torch.bfloat16).to(torch.float32).numpy()
    if after == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), after)
    return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(after)), after)


def _with_index(patch_tensor: Callable[..., Any]) -> Callable[..., Any]:
    """Triton 3.6 makes loop bounds with int(array of one element), which numpy 2.4 no longer takes."""

    def patched(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def _refuse_bf16(binary_op: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(self: Any, left: interpreter.TensorHandle, right: interpreter.TensorHandle, op: Any) -> Any:
        assert tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar), "the interpreter computes garbage in bf16: convert first"
        return binary_op(self, left, right, op)

    return refuse
