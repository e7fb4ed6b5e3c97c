"""Bias and GELU's own facts; what holds for every operation is in test_cases.py."""

import math

import pytest
import torch
from fasttrain_kernels.bias_gelu import APPROXIMATIONS, MAX_ROWS, bias_gelu, bias_gelu_reference
from fasttrain_kernels.cases.elementwise import bias_gelu_inputs
from fasttrain_kernels.partial_sums import sum_rows
from torch import Tensor
from torch.nn import functional as F

# exp2 of a large argument is meant to become infinite; numpy, beneath the interpreter, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")

CPU = torch.device("cpu")
ROUNDING = 1.2e-6
"""Of a GPU's approximate rsqrt (2^-22.9, squared) and exp2 (2^-22), and of some fp32 operations around them."""

each_approximation = pytest.mark.parametrize("approximate", APPROXIMATIONS)


def value_and_slope(u: Tensor, approximate: str, impl: str) -> tuple[Tensor, Tensor]:
    u = u.detach().requires_grad_()
    y = bias_gelu(u, torch.zeros_like(u[0]), approximate=approximate, impl=impl)
    return y.detach(), torch.autograd.grad(y.sum(), u)[0]


@each_approximation
def test_it_is_torchs_gelu(approximate: str) -> None:
    x, bias = bias_gelu_inputs((7, 24), torch.float32, CPU).values()
    assert torch.equal(bias_gelu(x, bias, approximate=approximate), F.gelu(x + bias, approximate=approximate))


@pytest.mark.usefixtures("kernels")
@each_approximation
def test_the_curve_and_its_slope_are_right_everywhere(approximate: str, device: torch.device) -> None:
    u = torch.linspace(-14, 14, 200_001, device=device)[:, None]
    for ours, exact in zip(*(value_and_slope(v, approximate, impl) for v, impl in ((u, "triton"), (u.double(), "reference"))), strict=True):
        error = (ours - exact).abs() / exact.abs().clamp(min=1.0)
        assert error.max() < ROUNDING


@pytest.mark.usefixtures("kernels")
@each_approximation
def test_near_zero_it_is_half_the_input(approximate: str, device: torch.device) -> None:
    u = torch.logspace(-30, -5, 1000, device=device)[:, None] * torch.tensor([1.0, -1.0], device=device)
    y, slope = value_and_slope(u, approximate, "triton")
    torch.testing.assert_close(y, u * (0.5 + u * math.sqrt(0.5 / math.pi)), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(slope, 0.5 + u * math.sqrt(2 / math.pi), rtol=ROUNDING, atol=0)


@pytest.mark.usefixtures("kernels")
@each_approximation
def test_no_finite_input_overflows_to_nan(approximate: str, device: torch.device) -> None:
    u = torch.logspace(0, 38, 300, device=device)[:, None] * torch.tensor([1.0, -1.0], device=device)
    y, slope = value_and_slope(u, approximate, "triton")
    assert torch.isfinite(y).all() and torch.isfinite(slope).all()
    far = u[:, 0] > 20
    assert torch.equal(y[far], torch.stack([u[far, 0], torch.zeros_like(u[far, 0])], 1))
    assert (slope[far] - torch.tensor([1.0, 0.0], device=device)).abs().max() < 1e-20


@pytest.mark.usefixtures("kernels")
@each_approximation
def test_nan_stays_nan(approximate: str, device: torch.device) -> None:
    y, slope = value_and_slope(torch.tensor([[math.nan, 1.0]], device=device), approximate, "triton")
    for result in (y, slope):
        assert result.isnan().tolist() == [[True, False]]


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize(("width", "bias_dtype"), [(40, torch.float32), (300, torch.bfloat16)])
def test_the_biass_gradient_is_summed_before_it_is_rounded(width: int, bias_dtype: torch.dtype, device: torch.device) -> None:
    x = bias_gelu_inputs((3000, width), torch.bfloat16, device)["x"]
    bias = torch.zeros(width, dtype=bias_dtype, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(bias_gelu(x, bias, impl="triton").sum(dtype=torch.float32), bias)
    exact = torch.func.grad(lambda b: bias_gelu_reference(x.double(), b).sum())(bias.detach().double())
    assert gradient.dtype == bias_dtype
    torch.testing.assert_close(gradient.double(), exact, rtol=2.0**-8 if bias_dtype == torch.bfloat16 else 1e-6, atol=1e-5)


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("rows", [1, 7, 256, 1000])
def test_partial_sums_are_added_in_full(rows: int, device: torch.device) -> None:
    parts = torch.randn(rows, 2, 37, generator=torch.Generator().manual_seed(rows)).to(device)
    torch.testing.assert_close(sum_rows(parts, torch.float32), parts.double().sum(0).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tanh", [False, True])
def test_the_registered_operations_pass_torchs_own_checks(tanh: bool, device: torch.device) -> None:
    x, bias = bias_gelu_inputs((2, 3, 5), torch.float32, device).values()
    torch.library.opcheck(torch.ops.fasttrain.bias_gelu.default, (x, bias, tanh))
    torch.library.opcheck(torch.ops.fasttrain.bias_gelu_backward.default, (torch.rand_like(x), x, bias, tanh))


@pytest.mark.usefixtures("kernels")
def test_a_second_derivative_is_refused(device: torch.device) -> None:
    x, bias, upstream = torch.ones(3, 1, 2, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(bias_gelu(x, bias[0], impl="triton"), x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(2**19, 4608, dtype=torch.bfloat16, device=device, requires_grad=True)
    bias = torch.randn(4608, dtype=torch.bfloat16, device=device)
    y = bias_gelu(x, bias, impl="triton")
    (dx,) = torch.autograd.grad(y, x, x.detach())
    last = x.detach()[-2:].requires_grad_()
    expected = bias_gelu_reference(last, bias)
    torch.testing.assert_close(y[-2:], expected)
    torch.testing.assert_close(dx[-2:], torch.autograd.grad(expected, last, last.detach())[0])


@pytest.mark.usefixtures("kernels")
def test_more_rows_than_32_bits_count_are_refused(device: torch.device) -> None:
    x = torch.zeros(1, 1, device=device).expand(MAX_ROWS + 1, 1)
    with pytest.raises(ValueError, match=f"at most {MAX_ROWS} rows"):
        bias_gelu(x, torch.zeros(1, device=device), impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"approximate": "erf"}, "unknown approximate 'erf'; known: none, tanh"),
        ({"bias": torch.ones(7)}, r"x must be \[..., D\] and bias \[D\], got \[2, 8\] and \[7\]"),
        ({"x": torch.tensor(1.0)}, r"got \[\] and \[8\]"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x must be of a floating-point type"),
        ({"bias": torch.ones(8, device="meta")}, "bias is on meta"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_gelu(**{**bias_gelu_inputs((2, 8), torch.float32, CPU), **change})
