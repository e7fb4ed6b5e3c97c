"""Every kernel that the operations launch compiles for three generations of GPUs, without spills and with wide accesses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels.cases import CASES, Case

from tests.kernels.ahead_of_time import ARCHITECTURES, SHARED_MEMORY, Compiled, compile_launch
from tests.kernels.calls import results
from tests.kernels.interpreter import Launch, recording

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles here and now, not from the cache of an earlier run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def launches(case: Case, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What one forward and backward pass would launch."""
    with recording() as recorded:
        results(case.call, case.inputs(shape, dtype, CPU), case, impl="triton", **options)
    return recorded


def every_launch() -> list[Any]:
    return [
        pytest.param(case, options, (4, *sample), id="-".join(map(str, [name, *options.values(), *sample])))
        for name, case in CASES.items()
        for options in case.options
        for sample in case.real
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("case", "options", "shape"), every_launch())
def test_no_spills_and_16_byte_accesses(
    case: Case, options: dict[str, Any], shape: tuple[int, ...], architecture: str, tmp_path: Path
) -> None:
    for launch in launches(case, shape, options):
        compiled = compile_launch(launch, architecture, tmp_path)
        name = launch.kernel.fn.__name__
        assert compiled.spilled_bytes == 0, name
        assert compiled.shared_bytes <= SHARED_MEMORY[architecture], name
        assert is_wide(compiled, launch), f"{name}: {compiled.global_accesses}"


def is_wide(compiled: Compiled, launch: Launch) -> bool:
    """No access of a single bf16 element, and one of 16 bytes for each bf16 tensor."""
    widths = [width for _, width in compiled.global_accesses]
    bf16 = [value for value in launch.bound().values() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16]
    return 2 not in widths and widths.count(16) >= len(bf16)


def test_narrow_accesses_would_be_seen(tmp_path: Path) -> None:
    (launch,) = recorded_noising(torch.ones(4, 4, 32, 32, dtype=torch.bfloat16))
    assert is_wide(compile_launch(launch, "sm_90", tmp_path), launch)
    (launch,) = recorded_noising(torch.ones(4 * 4096 + 1, dtype=torch.bfloat16)[1:].view(4, 4, 32, 32))
    assert not is_wide(compile_launch(launch, "sm_90", tmp_path), launch)


def recorded_noising(x0: torch.Tensor) -> list[Launch]:
    case = CASES["noising"]
    with recording() as recorded:
        case.call(**{**case.inputs(tuple(x0.shape), x0.dtype, CPU), "x0": x0}, impl="triton")
    return recorded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sizes_of_one_compile(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # A real launch turns a size of 1 into a constant, which a kernel must tolerate.
    for shape in CASES[name].smallest:
        for launch in launches(CASES[name], shape, CASES[name].options[0], dtype):
            assert compile_launch(launch, "sm_90", tmp_path).spilled_bytes == 0
