"""Compiles recorded kernel launches for GPUs that are not here, specialised as a real launch would be, and reads what came out.

What ptxas tells comes through `knobs.nvidia.dump_ptxas_log`, which Triton 3.6 and 3.7 have alike: both print all that `ptxas -v` wrote.
"""

import functools
import re
import subprocess
from collections.abc import Hashable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton._utils import find_paths_if
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from tests.kernels.interpreter import Launch

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes one program may use."""
ORDERED_BY_CHANCE = re.compile(r"\b(?:tt\.atomic\w*|atom\.[\w.:]+|red\.[\w.:]+)")
"""Instructions of TTIR and PTX by which programs or threads add to the same address in whatever order they come."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ACCESS = re.compile(r"\b(LDGSTS|LDG|STG)((?:\.\w+)*)")
_ADVANCED = re.compile(r"(%\w+) = tt\.addptr (%\w+), .*?, (?:tensor<[\dx]*)?i(\d+)>?")
_MOVED = re.compile(r"(%\w+) = tt\.(?:splat|broadcast|expand_dims|reshape|bitcast|trans) (%\w+)")
_CARRIED = re.compile(r"iter_args\((.*?)\)")
_TOUCHED = re.compile(r"tt\.(?:load|store) (%\w+)")
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code for one architecture."""

    architecture: str
    ttir: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    assembled: str
    """What ptxas told of the kernel while it made the cubin."""

    @property
    def registers(self) -> int:
        """Of one thread."""
        return int(re.findall(r"Used (\d+) registers", self.assembled)[0])

    @property
    def spilled_bytes(self) -> int:
        """Register spill stores and loads, as ptxas counts them (its stack figure includes more than spills)."""
        return sum(map(int, re.findall(r"(\d+) bytes spill", self.assembled)))

    @cached_property
    def global_accesses(self) -> list[tuple[str, int]]:
        """(LDG, STG or LDGSTS, bytes a thread) of each access to global memory in the disassembled code; LDGSTS is cp.async."""
        with TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(self.cubin)
            sass = subprocess.run([_TOOLS / "nvdisasm", "-c", "-ndf", binary], capture_output=True, text=True, check=True).stdout
        return [(kind, _width(suffixes)) for kind, suffixes in _ACCESS.findall(sass)]

    @property
    def ordered_by_chance(self) -> list[str]:
        """The atomic instructions, which make sums differ from run to run."""
        return ORDERED_BY_CHANCE.findall(self.ttir) + ORDERED_BY_CHANCE.findall(self.ptx)

    @property
    def pointers_from_a_table(self) -> int:
        """How many pointers the kernel makes of loaded addresses, beside those among its arguments."""
        return self.ttir.count("tt.int_to_ptr")

    @cached_property
    def narrow_offsets(self) -> set[str]:
        """Arguments that some load or store reaches by 32-bit offsets alone: no place for more than 2^31 elements."""
        origin = {result: source for result, source in _MOVED.findall(self.ttir)}
        for carried in _CARRIED.findall(self.ttir):
            origin.update(re.findall(r"(%\w+) = (%\w+)", carried))
        steps = {result: (pointer, bits) for result, pointer, bits in _ADVANCED.findall(self.ttir)}
        arguments = set(re.findall(r"(%\w+): !tt\.ptr", self.ttir))
        found = set()
        for pointer in _TOUCHED.findall(self.ttir):
            widths = set()
            while pointer in steps or pointer in origin:
                if pointer in steps:
                    pointer, bits = steps[pointer]
                    widths.add(bits)
                else:
                    pointer = origin[pointer]
            if widths and "64" not in widths and pointer in arguments:
                found.add(pointer.removeprefix("%"))
        return found


@dataclass(frozen=True)
class Specialised:
    """A kernel with the types, constants and alignments of one launch: all that its machine code depends on."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Hashable], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Hashable], ...]

    @classmethod
    def of(cls, launch: Launch) -> "Specialised":
        """What Triton infers from the arguments at a real launch: 1 is a constant, multiples of 16 are known."""
        signature, constants, aligned = {}, {}, []
        for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.bound().values(), strict=True)):
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = mangle_type(value)
            aligned.extend((index, *path) for path in find_paths_if(value, lambda _, element: _multiple_of_16(element)))
        return cls(launch.kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(launch.options().items()))

    def source(self) -> ASTSource:
        aligned = {path: [["tt.divisibility", 16]] for path in self.aligned}
        return ASTSource(fn=self.kernel, signature=dict(self.signature), constexprs=dict(self.constants), attrs=aligned)


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """The recorded launch's kernel for `architecture`; launches that differ in nothing that matters share one."""
    return _compiled(Specialised.of(launch), architecture)


@functools.cache
def _compiled(specialised: Specialised, architecture: str) -> Compiled:
    target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    told = StringIO()
    # A cache of this compilation alone: what another run left would be found without ptxas's words.
    with TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope(), redirect_stdout(told):
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(specialised.source(), target=target, options=dict(specialised.options))
    return Compiled(architecture, str(kernel.asm["ttir"]), kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.shared, told.getvalue())


def _multiple_of_16(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _width(suffixes: str) -> int:
    parts = suffixes.split(".")
    return next((size for name, size in _WIDTHS.items() if name in parts), 4)
