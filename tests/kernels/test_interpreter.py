"""The stand-in for a GPU is trustworthy: it rounds as one does, and leaves Triton as it found it."""

import pytest
import torch
import triton.language as tl
from fasttrain_kernels import adaln as adaln_file
from fasttrain_kernels import dispatch
from fasttrain_kernels.cases import CASES
from fasttrain_kernels.language import jit
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder
from triton.runtime.jit import JITFunction

from tests.kernels.interpreter import interpreting, launching_for, recording, run_program
from tests.kernels.memory import ELSEWHERE, Traffic

WATCHED = ("cast_impl", "binary_op", "create_masked_load", "create_masked_store", "create_int_to_ptr", "create_atomic_rmw", "set_grid_idx")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run natively here")


@jit
def _convert(source, target, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane).to(tl.float32))


@jit
def _add_in_bf16(source, target, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane) + tl.load(source + lane))


@jit
def _rows(source, factor, target, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    repeated = tl.zeros([2, 1], tl.int32) + column[None, :]
    scale = tl.sum(tl.load(factor + repeated, mask=repeated < WIDTH, other=0.0), axis=0)
    row = tl.program_id(0) * 2
    for each in range(row, tl.minimum(row + 2, rows)):
        value = tl.load(source + each * WIDTH + column, mask=column < WIDTH, other=0.0)
        tl.store(target + each * WIDTH + column, value * scale, mask=column < WIDTH)


@jit
def _counts_kernel(total, BLOCK: tl.constexpr):
    tl.atomic_add(total + tl.arange(0, BLOCK), 1.0)


@jit
def _through_addresses(table, values, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    place = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(place + lane, tl.load(values + lane))


@needs_interpreter
def test_stores_to_bf16_round_to_nearest_even() -> None:
    values = torch.randn(1024) * torch.logspace(-38, 38, 1024)
    values[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan")])
    rounded, back = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    with interpreting():
        _convert[1,](values, rounded, 1024)
        _convert[1,](rounded, back, 1024)
    torch.testing.assert_close(rounded, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, rounded.float(), rtol=0, atol=0, equal_nan=True)


@needs_interpreter
def test_arithmetic_in_bf16_is_refused() -> None:
    with interpreting(), pytest.raises(Exception, match="garbage in bf16"):
        _add_in_bf16[1,](torch.ones(4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.bfloat16), 4)


@needs_interpreter
def test_nothing_is_left_behind() -> None:
    def state() -> list[object]:
        patched = (JITFunction.run, JITFunction.__call__, *map(vars(InterpreterBuilder).get, WATCHED))
        language = (tl.load, tl.sum, tl.core.reduce, tl.tensor.__add__)
        return [set(vars(adaln_file)), dispatch.INTERPRETED, interpreter._patch_lang_tensor, *patched, *language]

    before = state()
    assert None not in before
    inputs = CASES["adaln"].inputs((1, 2, 4), torch.float32, torch.device("cpu"))
    with interpreting() as launches:
        CASES["adaln"].call(**inputs, impl="triton")
    assert len(launches) == 1 and state() == before


def test_a_recording_runs_nothing() -> None:
    source, target = torch.ones(4), torch.zeros(4)
    with recording() as launches:
        _convert[1,](source, target, BLOCK=4, num_warps=2)
    assert torch.equal(target, torch.zeros(4))
    assert launches[0].bound() == {"source": source, "target": target, "BLOCK": 4} and launches[0].options() == {"num_warps": 2}


@needs_interpreter
def test_traffic_is_what_active_lanes_move() -> None:
    source, factor = torch.ones(5, 12), torch.ones(12, dtype=torch.float16)
    target = torch.empty(5, 12)
    with interpreting(counting=True) as launches:
        _rows[3,](source, factor, target, 5, 12, 16)
    assert launches[0].traffic == {
        "source": Traffic(read=5 * 12 * 4),
        # Both rows of a program's access meet the same 12 numbers, which counts once; 3 programs.
        "factor": Traffic(read=3 * 12 * 2),
        "target": Traffic(written=5 * 12 * 4),
    }


@needs_interpreter
def test_traffic_through_a_table_of_addresses_is_apart() -> None:
    targets = [torch.zeros(4), torch.zeros(4)]
    table = torch.tensor([target.data_ptr() for target in targets])
    with interpreting(counting=True) as launches:
        _through_addresses[2,](table, torch.ones(4), 4)
    assert all(target.eq(1).all() for target in targets)
    assert launches[0].traffic == {"table": Traffic(read=16), "values": Traffic(read=32), ELSEWHERE: Traffic(written=32)}


@needs_interpreter
def test_an_atomic_addition_reads_and_writes() -> None:
    total = torch.zeros(4)
    with interpreting(counting=True) as launches:
        _counts_kernel[3,](total, 4)
    assert total.eq(3).all() and launches[0].traffic == {"total": Traffic(read=48, written=48)}


@needs_interpreter
def test_an_access_outside_every_argument_is_refused() -> None:
    source, target = torch.zeros(9, 12)[:5], torch.zeros(9, 12)[:5]
    with interpreting(), pytest.raises(Exception, match="outside every argument"):
        _rows[3,](source, torch.ones(12), target, 6, 12, 16)


@needs_interpreter
def test_one_program_of_a_launch_runs_alone() -> None:
    target = torch.zeros(5, 12)
    with recording() as launches:
        _rows[3,](torch.ones(5, 12), torch.ones(12), target, 5, 12, 16)
    run_program(launches[0], (1,))
    assert target[2:4].eq(2).all() and target[:2].eq(0).all() and target[4:].eq(0).all()


def test_launchers_see_the_processors_of_another_device() -> None:
    case = CASES["adaln"]
    inputs = case.inputs((2, 64, 8), torch.float32, torch.device("cpu"))
    with recording() as here:
        case.call(**inputs, impl="triton")
    with recording() as there, launching_for(16):
        case.call(**inputs, impl="triton")
    assert there[0].grid[1] > here[0].grid[1]
    assert not inputs["x"].is_cuda
