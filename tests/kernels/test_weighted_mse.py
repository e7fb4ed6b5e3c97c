"""The loss's own facts; what holds for every operation is in test_cases.py."""

import pytest
import torch
from fasttrain_kernels import weighted_mse as module
from fasttrain_kernels.cases.noise import weighted_mse_inputs
from fasttrain_kernels.philox import normal
from fasttrain_kernels.weighted_mse import weighted_mse
from torch.nn import functional as F

CPU = torch.device("cpu")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("target", ["x0", "eps", "v", "flow"])
def test_every_target_is_linear_in_x0_and_eps(target: str, impl: str, device: torch.device) -> None:
    inputs = weighted_mse_inputs((3, 4, 5, 5), torch.float32, device)
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1], device=device), torch.tensor([0.3, 0.8, 0.7], device=device)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    coefficients = {"x0": (one, zero), "eps": (zero, one), "v": (-sigma, alpha), "flow": (-one, one)}[target]
    inputs["x0_coef"], inputs["eps_coef"] = coefficients
    eps = normal(inputs["seed"], inputs["position"], (4, 5, 5))
    wanted = coefficients[0][:, None, None, None] * inputs["x0"] + coefficients[1][:, None, None, None] * eps
    mse = F.mse_loss(inputs["pred"], wanted, reduction="none").mean((1, 2, 3))
    loss, plain = weighted_mse(**inputs, impl=impl)
    torch.testing.assert_close(plain, mse, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, inputs["weight"] * mse, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_only_the_loss_is_differentiable(impl: str, device: torch.device) -> None:
    inputs = weighted_mse_inputs((2, 3, 4), torch.bfloat16, device)
    inputs["pred"].requires_grad_()
    loss, mse = weighted_mse(**inputs, impl=impl)
    assert loss.requires_grad and not mse.requires_grad
    assert loss.dtype == mse.dtype == torch.float32


@pytest.mark.usefixtures("kernels")
def test_more_blocks_than_one_pass_adds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)
    inputs = weighted_mse_inputs((2, 27), torch.float32, device)
    torch.testing.assert_close(weighted_mse(**inputs, impl="triton"), weighted_mse(**inputs, impl="reference"))


@pytest.mark.usefixtures("kernels")
def test_the_gradient_of_the_mean_loss_is_that_of_plain_torch(device: torch.device) -> None:
    inputs = weighted_mse_inputs((3, 2, 9), torch.float32, device)
    pred = inputs.pop("pred").requires_grad_()
    (ours,) = torch.autograd.grad(weighted_mse(pred, **inputs, impl="triton")[0].mean(), pred)
    eps = normal(inputs["seed"], inputs["position"], (2, 9))
    target = inputs["x0_coef"][:, None, None] * inputs["x0"] + inputs["eps_coef"][:, None, None] * eps
    loss = (inputs["weight"] * (pred - target).square().mean((1, 2))).mean()
    (theirs,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("kernels")
def test_the_registered_operations_pass_torchs_own_checks(device: torch.device) -> None:
    inputs = weighted_mse_inputs((2, 3, 5), torch.float32, device)
    inputs["pred"].requires_grad_()
    torch.library.opcheck(torch.ops.fasttrain.weighted_mse.default, tuple(inputs.values()))
    plain = (torch.rand(2, device=device), *(t.detach() for t in inputs.values()))
    torch.library.opcheck(torch.ops.fasttrain.weighted_mse_backward.default, plain)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x0", torch.ones(2, 3, 5), r"pred and x0 must both be \[B, ...\].*\[2, 3, 4\] and \[2, 3, 5\]"),
        ("weight", torch.ones(1), r"weight must be \[2\]"),
        ("eps_coef", torch.ones(2, requires_grad=True), "only pred gets a gradient: detach eps_coef"),
        ("x0", torch.ones(2, 3, 4, dtype=torch.uint8), "x0 must be of a floating-point type, got torch.uint8"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: torch.Tensor, message: str) -> None:
    inputs = weighted_mse_inputs((2, 3, 4), torch.float32, CPU)
    with pytest.raises(ValueError, match=message):
        weighted_mse(**{**inputs, name: value})


def test_empty_samples_have_no_mean() -> None:
    with pytest.raises(ValueError, match="with elements in each sample"):
        weighted_mse(**weighted_mse_inputs((2, 0, 4), torch.float32, CPU))
