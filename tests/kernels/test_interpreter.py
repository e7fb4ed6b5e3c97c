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

from tests.kernels.interpreter import interpreting, recording

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run natively here")


@jit
def _convert(source, target, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane).to(tl.float32))


@jit
def _add_in_bf16(source, target, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane) + tl.load(source + lane))


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
        patched = (JITFunction.run, JITFunction.__call__, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op)
        language = (tl.load, tl.sum, tl.core.reduce, tl.tensor.__add__)
        return [set(vars(adaln_file)), dispatch.INTERPRETED, interpreter._patch_lang_tensor, *patched, *language]

    before = state()
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
