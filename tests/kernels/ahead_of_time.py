"""Compiles recorded kernel launches for GPUs that are not here, specialised as a real launch would be, and reads what came out."""

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from tests.kernels.interpreter import Launch

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes one program may use."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code for one architecture."""

    architecture: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    folder: Path

    @cached_property
    def spilled_bytes(self) -> int:
        """Register spill stores and loads, as ptxas counts them (its stack figure includes more than spills)."""
        source = self.folder / "kernel.ptx"
        source.write_text(self.ptx)
        target = re.search(r"^\.target (\w+)", self.ptx, re.MULTILINE)
        assembler = _TOOLS / ("ptxas-blackwell" if self.architecture == "sm_100" else "ptxas")
        command = [assembler, "-v", f"--gpu-name={target[1]}", source, "-o", self.folder / "again.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return sum(map(int, re.findall(r"(\d+) bytes spill", told)))

    @cached_property
    def global_accesses(self) -> list[tuple[str, int]]:
        """("LDG" or "STG", bytes a thread) of each access to global memory, in the disassembled code."""
        binary = self.folder / "kernel.cubin"
        binary.write_bytes(self.cubin)
        sass = subprocess.run([_TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
        return [(kind, _width(suffixes)) for kind, suffixes in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", sass)]


def compile_launch(launch: Launch, architecture: str, folder: Path) -> Compiled:
    """The recorded launch's kernel for `architecture`."""
    target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    kernel = triton.compile(_source(launch), target=target, options=launch.options())
    return Compiled(architecture, kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.shared, folder)


def _source(launch: Launch) -> ASTSource:
    """Types and specialisations that Triton infers from the arguments at a real launch: 1 is a constant, multiples of 16 are known."""
    signature, constants, aligned = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.bound().values(), strict=True)):
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if _multiple_of_16(value):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)


def _multiple_of_16(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _width(suffixes: str) -> int:
    parts = suffixes.split(".")
    if "256" in parts:
        return 32
    return next((size for name, size in {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}.items() if name in parts), 4)
