"""Residual norm's own facts; what it shares with the other norms is in test_norm.py, what holds for every operation in test_cases.py."""

from functools import partial
from typing import Any

import pytest
import torch
from fasttrain_kernels import norm as norm_module
from fasttrain_kernels.cases.norms import residual_norm_inputs
from fasttrain_kernels.norm import MAX_WIDTH
from fasttrain_kernels.residual_norm import residual_norm, residual_norm_reference

from tests.kernels.within_budget import Arguments, outputs_and_gradients, require_within_budget

CPU = torch.device("cpu")

both_norms = pytest.mark.parametrize("norm", ["layer", "rms"])


def require_kernel_within_budget(inputs: Arguments, **options: Any) -> None:
    require_within_budget(partial(residual_norm, impl="triton", **options), partial(residual_norm_reference, **options), inputs)


def test_it_is_torchs_norm_of_the_sum() -> None:
    x, branch, weight, bias = residual_norm_inputs((2, 3, 8), torch.float32, CPU).values()
    x_new, y = residual_norm(x, branch, weight, bias)
    assert torch.equal(x_new, x + branch)
    assert torch.equal(y, torch.nn.functional.layer_norm(x + branch, (8,), weight, bias, eps=1e-6))
    _, y = residual_norm(x, branch, weight, None, norm="rms")
    assert torch.equal(y, torch.nn.functional.rms_norm(x + branch, (8,), weight, eps=1e-6))


@pytest.mark.usefixtures("kernels", "poisoned")
@both_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("absent", [("branch",), ("bias",), ("branch", "bias")], ids="-".join)
def test_branch_and_bias_may_be_absent(absent: tuple[str, ...], dtype: torch.dtype, norm: str, device: torch.device) -> None:
    given = residual_norm_inputs((2, 5, 72), dtype, device)
    require_kernel_within_budget({name: None if name in absent else t for name, t in given.items()}, norm=norm)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_without_a_branch_x_is_not_copied(impl: str, device: torch.device) -> None:
    x, _, weight, bias = residual_norm_inputs((2, 3, 8), torch.float32, device).values()
    x_new, _ = residual_norm(x, None, weight, bias, impl=impl)
    assert x_new.data_ptr() == x.data_ptr()


@pytest.mark.usefixtures("kernels")
def test_without_a_branch_it_compiles_as_one_graph(device: torch.device) -> None:
    # There an output is an input, which a compiler could lose a gradient of.
    x, _, weight, bias = residual_norm_inputs((2, 3, 8), torch.float32, device).values()
    inputs = {"x": x, "branch": None, "weight": weight, "bias": bias}
    torch.compiler.reset()
    compiled = torch.compile(residual_norm, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    eager = outputs_and_gradients(partial(residual_norm, impl="triton"), inputs)
    torch.testing.assert_close(outputs_and_gradients(partial(compiled, impl="triton"), inputs), eager)


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("shape", [(72,), (7, 72), (2, 3, 2, 72)], ids=str)
def test_x_may_have_any_number_of_dimensions(shape: tuple[int, ...], device: torch.device) -> None:
    require_kernel_within_budget(residual_norm_inputs(shape, torch.float32, device))


@pytest.mark.usefixtures("kernels", "poisoned")
def test_weights_may_be_of_another_type_than_x(device: torch.device) -> None:
    x, branch, *_ = residual_norm_inputs((2, 3, 32), torch.bfloat16, device).values()
    *_, weight, bias = residual_norm_inputs((2, 3, 32), torch.float32, device).values()
    require_kernel_within_budget({"x": x, "branch": branch, "weight": weight, "bias": bias})
    assert residual_norm(x, branch, weight, bias, impl="triton")[1].dtype == torch.bfloat16


@pytest.mark.usefixtures("kernels", "poisoned")
def test_sums_over_hundreds_of_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # More partial sums than the second stage reads at once.
    monkeypatch.setattr(norm_module, "processors", lambda _: 132)
    require_kernel_within_budget(residual_norm_inputs((300, 3), torch.float32, device))


def test_x_and_branch_share_the_gradient_that_is_written_once() -> None:
    pytest.importorskip("triton")
    from tests.kernels.interpreter import recording

    leaves = [t.requires_grad_() for t in residual_norm_inputs((2, 3, 40), torch.float32, CPU).values()]
    with recording() as launches:
        x_new, y = residual_norm(*leaves, impl="triton")
        dx, dbranch, *_ = torch.autograd.grad(x_new.sum() + y.sum(), leaves)
    assert dx.data_ptr() == dbranch.data_ptr()
    assert [launch.bound()["dbranch"] for launch in launches if "dbranch" in launch.bound()] == [None]


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 36 * 2**30:
        pytest.skip("needs 36 GiB of free GPU memory")
    rows, width = 2_097_152, 1152
    x, branch = (torch.randn(rows, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight, bias = torch.randn(2, width, dtype=torch.bfloat16, device=device)
    last = [t[-64:] for t in residual_norm(x, branch, weight, bias, impl="triton")]
    torch.testing.assert_close(last, list(residual_norm_reference(x[-64:], branch[-64:], weight, bias)))


@pytest.mark.usefixtures("kernels")
def test_a_width_beyond_the_registers_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"D = {MAX_WIDTH + 1}"):
        residual_norm(**residual_norm_inputs((1, MAX_WIDTH + 1), torch.float32, device), impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "unknown norm 'batch'; known: layer, rms"),
        ({"weight": torch.ones(7)}, r"weight and bias \[D\] of one type, got \[2, 3, 8\], \[7\] torch.float32 and \[8\]"),
        ({"weight": torch.ones(7), "bias": None}, r"got \[2, 3, 8\], \[7\] torch.float32$"),
        ({"bias": torch.ones(8, dtype=torch.bfloat16)}, r"\[8\] torch.bfloat16"),
        ({"branch": torch.ones(3, 8)}, r"branch must be like x, \[2, 3, 8\] torch.float32, got \[3, 8\]"),
        ({"branch": torch.ones(2, 3, 8, dtype=torch.bfloat16)}, "branch must be like x, .* got .* torch.bfloat16"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int32)}, "x must be of a floating-point type"),
        ({"bias": torch.ones(8, device="meta")}, "bias is on meta"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; known: auto, triton, reference"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_norm(**{**residual_norm_inputs((2, 3, 8), torch.float32, CPU), **change})
