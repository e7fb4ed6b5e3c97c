"""Bugs that other trainers have shipped: each is planted here, and the check that the real operations pass must notice it."""

import ast
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fasttrain_kernels
import numpy as np
import pytest
import torch
import triton.language as tl
from fasttrain_kernels.adamw_ema import adamw_ema, adamw_ema_reference
from fasttrain_kernels.cases import CASES, Case
from fasttrain_kernels.language import jit, triton
from torch import Tensor

from tests.kernels import test_cases as checks
from tests.kernels.ahead_of_time import ORDERED_BY_CHANCE, compile_launch
from tests.kernels.huge import TAIL, last_elements
from tests.kernels.interpreter import recording, run_program

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="single programs run in the interpreter only")


# Modulation by block instead of by sample: right at batch 1, wrong above it (OpenDiT).


@jit
def _modulate_kernel(
    x,  # [B, tokens, width]
    scale,  # [B, width]
    shift,  # [B, width]
    y,  # [B, tokens, width]
    batch,
    tokens,
    width,
    BY_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    owner = row // tokens if BY_SAMPLE else row % batch
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / width + 1e-6)
    gain = 1.0 + tl.load(scale + owner * width + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + owner * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, value * gain + offset, mask=inside)


def modulating(by_sample: bool, missing_rows: int = 0) -> Case:
    """AdaLN's case with a forward kernel of this file."""

    def call(x: Tensor, scale: Tensor, shift: Tensor, **_options: Any) -> Tensor:
        y, (batch, tokens, width) = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape
        block = triton.next_power_of_2(width)
        _modulate_kernel[batch * tokens - missing_rows,](x, scale, shift, y, batch, tokens, width, by_sample, block)
        return y

    return replace(CASES["adaln"], call=call, differentiable=())


LAYER = {"norm": "layer"}


@pytest.mark.usefixtures("kernels", "poisoned")
def test_modulation_by_block_is_noticed(device: torch.device) -> None:
    check = checks.test_outputs_and_gradients_keep_the_error_budget
    for shape in ((1, 3, 1152), (2, 4, 768), (5, 3, 384)):
        check(modulating(by_sample=True), LAYER, shape, torch.float32, device)
    check(modulating(by_sample=False), LAYER, (1, 3, 1152), torch.float32, device)
    for shape in ((2, 4, 768), (5, 3, 384)):
        with pytest.raises(AssertionError):
            check(modulating(by_sample=False), LAYER, shape, torch.float32, device)


# An output element that nobody wrote: right wherever the memory happens to hold the last call's result.


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_unwritten_row_is_noticed(dtype: torch.dtype, device: torch.device) -> None:
    with pytest.raises(AssertionError):
        checks.test_outputs_and_gradients_keep_the_error_budget(modulating(True, missing_rows=1), LAYER, (2, 4, 768), dtype, device)


# Silently wrong gradients of compiled code at batch 1 (pytorch issue 193061).


def wrong_when_compiled(x: Tensor, scale: Tensor, shift: Tensor, *, impl: str, **options: Any) -> Tensor:
    """The right result; but compiled at batch 1 scale's gradient is lost."""
    if torch.compiler.is_compiling() and x.shape[0] == 1:
        scale = scale.detach() + 0 * scale
    return CASES["adaln"].reference(x, scale, shift, **options)


def test_wrong_gradients_of_compiled_code_at_batch_1_are_noticed() -> None:
    planted = replace(CASES["adaln"], call=wrong_when_compiled)
    checks.test_compiles_as_one_graph(planted, LAYER, "reference", 2, CPU)
    with pytest.raises(AssertionError):
        checks.test_compiles_as_one_graph(planted, LAYER, "reference", 1, CPU)


# Sums whose order is left to chance: gradients that differ from run to run (Liger).

UNORDERED = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put_", "put_", "bincount", "histc"}
"""Of torch, not deterministic on a GPU."""


@jit
def _column_sums_kernel(x, total, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.atomic_add(total + column, tl.load(x + tl.program_id(0) * width + column))


def unordered(source: str) -> list[str]:
    """Names of operations that add in any order, in Python source."""
    names = [node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return [name for name in names if name.startswith("atomic_") or name in UNORDERED]


def test_atomics_are_noticed() -> None:
    with recording() as launches:
        _column_sums_kernel[8,](torch.ones(8, 128), torch.zeros(128), 128, 128)
    found = compile_launch(launches[0], "sm_90").ordered_by_chance
    assert any(name.startswith("tt.atomic") for name in found) and any(name.startswith(("atom.", "red.")) for name in found)
    assert ORDERED_BY_CHANCE.search("  @%p1 red.global.add.f32 [%rd1], %f1;")
    assert unordered("tl.atomic_add(total, x)\nout.index_add_(0, i, x)") == ["atomic_add", "index_add_"]


def test_no_kernel_file_adds_in_any_order() -> None:
    # test_ahead_of_time reads the same off the machine code of every launch.
    files = sorted(Path(fasttrain_kernels.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    assert {path.name: found for path in files if (found := unordered(path.read_text(encoding="utf-8")))} == {}


# np.take on a strided view copies all of the view to take a few rows.


def peak_bytes(action: Callable[[], Any]) -> int:
    """The most memory that Python and numpy held at once during the action, beyond what they held before."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def calls_of_take(source: str) -> list[int]:
    """Lines that call `take`, of numpy or of an array."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "take"]


def test_the_loader_takes_rows_without_copying_the_shard(tmp_path: Path) -> None:
    shards = pytest.importorskip("fasttrain.data.shards", reason="the trainer's packages are not installed", exc_type=ImportError)
    from tests.shards import write_random

    shape = (2, 2, 4, 64, 64)
    opened = shards.ShardSet.open(write_random(tmp_path / "set", "latent", shape, classes=2))
    one = np.array([2])
    opened.gather(one)
    with opened._reader._held.use(0) as kept:
        sample, view = 2 * np.prod(shape), kept.view
    assert not view.flags.c_contiguous and len(view) == 3
    # One sample among the results, and one on the way there.
    assert peak_bytes(lambda: opened.gather(one)) < 2.5 * sample
    assert peak_bytes(lambda: np.take(view, one, axis=0)) > 3.5 * sample


def test_nothing_on_the_data_path_calls_take() -> None:
    assert calls_of_take("import numpy as np\nnp.take(view, rows, axis=0)\nview.take(rows)") == [2, 3]
    files = sorted((Path(__file__).resolve().parents[2] / "fasttrain" / "data").rglob("*.py"))
    assert len(files) > 5
    assert {path.name: lines for path in files if (lines := calls_of_take(path.read_text(encoding="utf-8")))} == {}


# 32-bit offsets: right up to 2^31 elements.


@jit
def _double_kernel(x, y, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    for first in range(0, WIDTH, BLOCK):
        tl.store(y + row * WIDTH + first + lane, 2.0 * tl.load(x + row * WIDTH + first + lane).to(tl.float32))


def doubling(wide: bool) -> Case:
    def call(x: Tensor, impl: str) -> Tensor:
        y = torch.empty_like(x)
        _double_kernel[x.shape[0],](x, y, wide, x[0].numel(), 512)
        return y

    def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"x": torch.randn(shape, device=device).to(dtype)}

    return replace(CASES["noising"], reference=lambda x: 2 * x, call=call, inputs=inputs, differentiable=())


def per_sample() -> Iterator[Any]:
    """The operations that work sample by sample; the optimizer's pass over one long tensor has a test of its own."""
    for name, case in CASES.items():
        if name != "adamw_ema":
            for options in case.options:
                yield pytest.param(case, options, id="-".join([name, *map(str, options.values())]))


@needs_interpreter
@pytest.mark.parametrize(("case", "options"), [pytest.param(doubling(wide=True), {}, id="doubling"), *per_sample()])
def test_more_than_2_to_the_31_elements(case: Case, options: dict[str, Any]) -> None:
    found = last_elements(case, options)
    assert found
    for error, allowed in found:
        assert all(ours <= most for ours, most in zip(error, allowed, strict=True))


@needs_interpreter
def test_32_bit_offsets_are_noticed() -> None:
    with pytest.raises(Exception, match="outside every argument"):
        last_elements(doubling(wide=False), {})


@needs_interpreter
def test_more_than_2_to_the_31_parameters() -> None:
    size = 2**31 + 4096
    state = {name: torch.empty(size) for name in ("param", "exp_avg", "exp_avg_sq", "ema")}
    lower = {name: torch.empty(size, dtype=torch.bfloat16) for name in ("grad", "weight")}
    ends = {name: t[-TAIL:] for name, t in {**state, **lower}.items()}
    for number, end in enumerate(ends.values()):
        end.copy_(torch.rand(TAIL, generator=torch.Generator().manual_seed(number)))
    expected = {name: end.clone() for name, end in ends.items()}
    with recording() as launches:
        update(adamw_ema, {**state, **lower}, impl="triton")
    (launch,) = launches
    run_program(launch, tuple(count - 1 for count in launch.grid))
    update(adamw_ema_reference, expected)
    for name, end in ends.items():
        torch.testing.assert_close(end, expected[name], rtol=1e-6 if end.dtype == torch.float32 else 0.01, atol=1e-7)
    assert not torch.equal(ends["param"], torch.rand(TAIL, generator=torch.Generator().manual_seed(0)))


def update(function: Callable[..., None], tensors: dict[str, Tensor], **options: Any) -> None:
    """One update of one long tensor, in place."""
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "update": 3, "decays": (0.5,)}
    function(*([tensors[name]] for name in names), [[tensors["ema"]]], weights=[tensors["weight"]], **settings, **options)
