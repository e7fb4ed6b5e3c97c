"""Which implementation runs, and that its absence is survived and said."""

import subprocess
import sys

import pytest
import torch
from fasttrain_kernels import dispatch

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from fasttrain_kernels import adaln, dispatch, noising, weighted_mse
assert dispatch.here() == "reference (Triton is not installed)"
x, row = torch.randn(1, 2, 4), torch.zeros(1, 4)
assert adaln.adaln(x, row, row).shape == x.shape
try:
    adaln.adaln(x, row, row, impl="triton")
except ValueError as error:
    print(error)
"""


def test_this_machine_is_told() -> None:
    assert dispatch.here().startswith("triton" if torch.cuda.is_available() else "reference (no CUDA device)")


def test_auto_follows_the_tensors() -> None:
    assert dispatch.choose("auto", torch.zeros(1)) == "reference"
    assert dispatch.choose("reference", torch.zeros(1)) == "reference"


@pytest.mark.gpu
def test_auto_takes_triton_on_the_gpu_and_leaves_float64_to_the_reference() -> None:
    assert dispatch.choose("auto", torch.zeros(1, device="cuda")) == "triton"
    assert dispatch.choose("auto", torch.zeros(1, device="cuda"), torch.zeros(1)) == "reference"
    assert dispatch.choose("auto", torch.zeros(1, device="cuda", dtype=torch.float64)) == "reference"


@pytest.mark.usefixtures("kernels")
def test_float64_is_refused_by_the_kernels(device: torch.device) -> None:
    with pytest.raises(ValueError, match="float64"):
        dispatch.choose("triton", torch.zeros(1, dtype=torch.float64, device=device))


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown impl 'cuda'; known: auto, triton, reference"):
        dispatch.choose("cuda")


def test_without_triton_everything_imports_and_the_references_run() -> None:
    told = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True, timeout=120)
    assert "Triton is not installed" in told.stdout


def test_one_operation_can_be_chosen_apart() -> None:
    kernels = dispatch.Kernels("triton", {"adaln": "reference"})
    assert (kernels.of("adaln"), kernels.of("noising"), dispatch.Kernels().of("noising")) == ("reference", "triton", "auto")
    with pytest.raises(ValueError, match="unknown operation 'adaln_zero'; did you mean 'adaln'"):
        dispatch.Kernels("auto", {"adaln_zero": "triton"})
    with pytest.raises(ValueError, match="unknown impl 'cuda'"):
        dispatch.Kernels("auto", {"adaln": "cuda"})


class OldDevice(torch.Tensor):
    """Stands for a tensor on a GPU that is too old, which no machine here has."""

    is_cuda = True


def test_a_gpu_that_triton_does_not_support_is_passed_over_and_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    dispatch._why_unsupported.cache_clear()
    dispatch._tell.cache_clear()
    tensor = torch.zeros(1).as_subclass(OldDevice)
    assert [dispatch.choose("auto", tensor) for _ in range(3)] == ["reference"] * 3
    assert capsys.readouterr().out.count("compute capability 8.0, and Old GPU has 6.1") == 1
    with pytest.raises(ValueError, match=r"Old GPU has 6\.1"):
        dispatch.choose("triton", tensor)
    dispatch._why_unsupported.cache_clear()
