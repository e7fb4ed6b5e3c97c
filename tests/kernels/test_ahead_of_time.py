"""Every kernel that the operations launch compiles for three generations of GPUs: no spills, wide accesses, the least bytes, no atomics."""

from math import prod
from typing import Any

import pytest
import torch
import triton.language as tl
from fasttrain_kernels.cases import CASES, Case, Shape
from fasttrain_kernels.language import jit

from tests.kernels.ahead_of_time import SHARED_MEMORY, Compiled, compile_launch
from tests.kernels.interpreter import Launch, recording
from tests.kernels.passes import CPU, Passes, counted, recorded, worth_counting

PROCESSORS = 132
"""Of an H100 or H200; launchers choose their grids by it."""


def telling(case: Case) -> Shape:
    """The width to look at where one must do: 1152 or what goes with it."""
    return case.real[min(2, len(case.real) - 1)]


def machine_code() -> list[Any]:
    """On sm_90 every option at one width and every width with one option; elsewhere one of each. static_report has them all."""
    chosen = []
    for name, case in CASES.items():
        first, last = case.options[0], case.options[-1]
        wanted = [("sm_90", options, telling(case)) for options in case.options]
        wanted += [("sm_90", first, sample) for sample in case.real if sample != telling(case)]
        wanted += [("sm_80", first, telling(case)), ("sm_100", last, telling(case))]
        for architecture, options, sample in wanted:
            identity = "-".join(map(str, [name, *options.values(), *sample, architecture]))
            chosen.append(pytest.param(case, options, sample, architecture, id=identity))
    return chosen


def settings() -> list[Any]:
    return [
        pytest.param(case, options, id="-".join(map(str, [name, *options.values()])))
        for name, case in CASES.items()
        for options in case.options
    ]


@pytest.mark.parametrize(("case", "options", "sample", "architecture"), machine_code())
def test_no_spills_wide_accesses_room_for_huge_tensors_and_no_atomics(
    case: Case, options: dict[str, Any], sample: Shape, architecture: str
) -> None:
    passes = recorded(case, (4, *sample), options, processors=PROCESSORS)
    for launch in passes.forward + passes.backward:
        compiled = compile_launch(launch, architecture)
        name = launch.kernel.fn.__name__
        assert compiled.spilled_bytes == 0, name
        assert compiled.shared_bytes <= SHARED_MEMORY[architecture], name
        assert is_wide(compiled, passes, launch), f"{name}: {compiled.global_accesses}"
        assert not compiled.narrow_offsets & passes.bulk(launch), name
        assert not compiled.ordered_by_chance, name


def is_wide(compiled: Compiled, passes: Passes, launch: Launch) -> bool:
    """Where tensors are in bulk: an access of 16 bytes for each that has several elements a thread, none of less than 4."""
    widths = [width for _, width in compiled.global_accesses]
    bulk = [launch.bound()[name] for name in passes.bulk(launch)]
    # A thread of an operation on single numbers, such as `uniform`, has one of 8 bytes; there is nothing to join.
    packed = [tensor for tensor in bulk if tensor.dim() > 1 or tensor.numel() > prod(launch.grid) * 32 * launch.options()["num_warps"]]
    tensors = len(packed) + compiled.pointers_from_a_table
    return not (bulk or tensors) or (min(widths) >= 4 and widths.count(16) >= tensors)


def test_narrow_accesses_would_be_seen() -> None:
    for x0, wide in ((torch.ones(4 * 4096), True), (torch.ones(4 * 4096 + 1)[1:], False)):
        launch = recorded_noising(x0.bfloat16() if wide else torch.ones(4 * 4096 + 1, dtype=torch.bfloat16)[1:])
        passes = Passes(4 * 4096, [x0], [launch], [])
        assert is_wide(compile_launch(launch, "sm_90"), passes, launch) is wide


def recorded_noising(x0: torch.Tensor) -> Launch:
    case, shape = CASES["noising"], (4, 4, 32, 32)
    with recording() as launches:
        case.call(**{**case.inputs(shape, x0.dtype, CPU), "x0": x0.view(shape)}, impl="triton")
    return launches[0]


def test_spills_would_be_seen() -> None:
    launch = recorded(CASES["gated_adaln"], (4, 256, 1152), {"norm": "layer"}, processors=PROCESSORS).backward[0]
    launch.settings["maxnreg"] = 32
    compiled = compile_launch(launch, "sm_90")
    assert compiled.spilled_bytes > 0 and compiled.registers <= 32


@pytest.mark.parametrize("name", ["bias_gelu", "qk_norm", "joint_qk_norm"])
def test_a_backward_grid_is_one_wave(name: str) -> None:
    # Its programs share the rows out among them: any that must wait for the others would run nearly alone, after them.
    case = CASES[name]
    for options in case.options:
        launch = recorded(case, (8, *telling(case)), options, processors=PROCESSORS).backward[0]
        registers = -(-compile_launch(launch, "sm_90").registers // 8) * 8
        programs = -(-prod(launch.grid) // PROCESSORS)
        assert programs > 1 and programs * launch.options()["num_warps"] * 32 * registers <= 65_536, (options, programs, registers)


@jit
def _narrow_kernel(source, target, width, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    for place in range(0, 2):
        wide = source + (row.to(tl.int64) + place) * width
        tl.store(target + (row + place) * width + lane, tl.load(wide + lane))


def test_32_bit_offsets_would_be_seen() -> None:
    with recording() as launches:
        _narrow_kernel[4,](torch.ones(5, 128), torch.ones(5, 128), 128, 128, num_warps=1)
    assert compile_launch(launches[0], "sm_90").narrow_offsets == {"target"}


@pytest.mark.parametrize(("case", "options"), settings())
def test_the_kernels_move_the_least_bytes(case: Case, options: dict[str, Any]) -> None:
    # Rows, statistics and partial sums are apart: static_report tells them at a real batch.
    passes = counted(case, worth_counting(telling(case)), options)
    for (_, launches), least in zip(passes, case.minimum, strict=True):
        if launches:
            assert passes.bulk_bytes(launches) / passes.elements == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sizes_of_one_compile(name: str, dtype: torch.dtype) -> None:
    # A real launch turns a size of 1 into a constant, which a kernel must tolerate, whichever the type: the second one tries one shape.
    for shape in CASES[name].smallest if dtype == torch.float32 else CASES[name].smallest[:1]:
        passes = recorded(CASES[name], shape, CASES[name].options[0], dtype)
        for launch in passes.forward + passes.backward:
            assert compile_launch(launch, "sm_90").spilled_bytes == 0
