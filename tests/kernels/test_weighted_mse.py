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
    loss, plain, _ = weighted_mse(**inputs, ranges=5, impl=impl)
    torch.testing.assert_close(plain, mse, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, inputs["weight"] * mse, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_only_the_loss_is_differentiable(impl: str, device: torch.device) -> None:
    inputs = weighted_mse_inputs((2, 3, 4), torch.bfloat16, device)
    inputs["pred"].requires_grad_()
    loss, mse, by_range = weighted_mse(**inputs, ranges=5, impl=impl)
    assert loss.requires_grad and not mse.requires_grad and not by_range.requires_grad
    assert loss.dtype == mse.dtype == by_range.dtype == torch.float32


RANGES = [0, 2, 2, 5, -7, 39, 2, 20]


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("ranges", [1, 4, 6, 40])
def test_every_sample_counts_in_one_range_and_outside_in_the_nearest(ranges: int, impl: str, device: torch.device) -> None:
    inputs = weighted_mse_inputs((len(RANGES), 2, 3), torch.float32, device)
    inputs["timestep_range"] = torch.tensor(RANGES, device=device)
    _, mse, by_range = weighted_mse(**inputs, ranges=ranges, impl=impl)
    wanted = torch.zeros(ranges, 2, device=device)
    for b, where in enumerate(RANGES):
        wanted[min(max(where, 0), ranges - 1)] += torch.stack([mse[b], torch.ones_like(mse[b])])
    torch.testing.assert_close(by_range, wanted)
    assert by_range[:, 1].sum() == len(RANGES)


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_samples_make_empty_ranges(impl: str, device: torch.device) -> None:
    loss, mse, by_range = weighted_mse(**weighted_mse_inputs((0, 2, 3), torch.float32, device), ranges=3, impl=impl)
    assert loss.shape == mse.shape == (0,) and torch.equal(by_range, torch.zeros(3, 2, device=device))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_sample_that_is_not_finite_spoils_its_own_range_only(impl: str, device: torch.device) -> None:
    inputs = weighted_mse_inputs((5, 4), torch.float32, device)
    inputs["pred"][1] = float("nan")
    loss, mse, by_range = weighted_mse(**inputs, ranges=5, impl=impl)
    spoiled = inputs["timestep_range"][1].item()
    assert [r for r in range(5) if by_range[r, 0].isnan()] == [spoiled]
    assert mse.isnan().tolist() == loss.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.usefixtures("kernels")
def test_a_samples_loss_does_not_know_its_batch(device: torch.device) -> None:
    inputs = weighted_mse_inputs((70, 5), torch.float32, device)
    together, _, by_range = weighted_mse(**inputs, ranges=5, impl="triton")
    for b in (0, 63, 64, 69):
        one = {name: t if name == "seed" else t[b : b + 1] for name, t in inputs.items()}
        assert torch.equal(weighted_mse(**one, ranges=5, impl="triton")[0][0], together[b])
    torch.testing.assert_close(by_range, weighted_mse(**inputs, ranges=5, impl="reference")[2])


@pytest.mark.usefixtures("kernels")
def test_more_blocks_than_one_pass_adds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)
    inputs = weighted_mse_inputs((2, 131), torch.float32, device)  # 33 blocks
    torch.testing.assert_close(weighted_mse(**inputs, ranges=5, impl="triton"), weighted_mse(**inputs, ranges=5, impl="reference"))


def test_more_than_2_to_the_31_elements_in_one_sample() -> None:
    """Only the last program of each launch runs, so that of the memory only its own is touched."""
    pytest.importorskip("triton")
    from tests.kernels.interpreter import recording, run_program

    size, ones = 2**31 + 8, torch.ones(1)
    pred, x0 = (torch.empty(1, size, dtype=torch.float16) for _ in range(2))
    pred[0, -8:], x0[0, -8:] = torch.arange(1.0, 9.0), 0.5 * torch.arange(1.0, 9.0)
    pred.requires_grad_()
    where = {"position": torch.zeros(1, dtype=torch.int64), "timestep_range": torch.zeros(1, dtype=torch.int64)}
    with recording() as launches:
        loss, _, _ = weighted_mse(pred, x0, 2 * ones, 0 * ones, 2.0**30 * ones, 3, **where, ranges=1, impl="triton")
        (dpred,) = torch.autograd.grad(loss, pred, torch.ones(1))
    sums, _, gradient = launches
    for launch in (sums, gradient):
        run_program(launch, (launch.grid[0] - 1,))
    assert sums.bound()["sums"][0, -1] == 0  # the target is 2 x0, which is pred
    assert torch.equal(dpred[0, -8:], torch.zeros(8, dtype=torch.float16))
    with torch.no_grad():
        pred[0, -8:] += 1
    for launch in (sums, gradient):
        run_program(launch, (launch.grid[0] - 1,))
    assert sums.bound()["sums"][0, -1] == 8
    torch.testing.assert_close(dpred[0, -8:], torch.ones(8, dtype=torch.float16))  # 2 / 2^31 of the weight


@pytest.mark.usefixtures("kernels")
def test_the_gradient_of_the_mean_loss_is_that_of_plain_torch(device: torch.device) -> None:
    inputs = weighted_mse_inputs((3, 2, 9), torch.float32, device)
    pred = inputs.pop("pred").requires_grad_()
    (ours,) = torch.autograd.grad(weighted_mse(pred, **inputs, ranges=5, impl="triton")[0].mean(), pred)
    eps = normal(inputs["seed"], inputs["position"], (2, 9))
    target = inputs["x0_coef"][:, None, None] * inputs["x0"] + inputs["eps_coef"][:, None, None] * eps
    loss = (inputs["weight"] * (pred - target).square().mean((1, 2))).mean()
    (theirs,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("kernels")
def test_the_registered_operations_pass_torchs_own_checks(device: torch.device) -> None:
    inputs = weighted_mse_inputs((2, 3, 5), torch.float32, device)
    torch.library.opcheck(torch.ops.fasttrain.weighted_mse.default, (*inputs.values(), 4))
    plain = (torch.rand(2, device=device), *list(inputs.values())[:-1])
    torch.library.opcheck(torch.ops.fasttrain.weighted_mse_backward.default, plain)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x0", torch.ones(2, 3, 5), r"pred and x0 must both be \[B, ...\].*\[2, 3, 4\] and \[2, 3, 5\]"),
        ("weight", torch.ones(1), r"weight must be \[2\]"),
        ("eps_coef", torch.ones(2, requires_grad=True), "only pred gets a gradient: detach eps_coef"),
        ("timestep_range", torch.zeros(3, dtype=torch.int64), r"timestep_range must be \[2\]"),
        ("timestep_range", torch.zeros(2), "timestep_range must be int64 and ranges at least 1, got torch.float32 and 4"),
        ("timestep_range", torch.zeros(2, dtype=torch.int64, device="meta"), "timestep_range is on meta, the other tensors on cpu"),
        ("ranges", 0, "ranges at least 1, got torch.int64 and 0"),
        ("x0", torch.ones(2, 3, 4, dtype=torch.uint8), "x0 must be of a floating-point type, got torch.uint8"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: torch.Tensor | int, message: str) -> None:
    inputs = weighted_mse_inputs((2, 3, 4), torch.float32, CPU)
    with pytest.raises(ValueError, match=message):
        weighted_mse(**{**inputs, "ranges": 4, name: value})


def test_empty_samples_have_no_mean() -> None:
    with pytest.raises(ValueError, match="with elements in each sample"):
        weighted_mse(**weighted_mse_inputs((2, 0, 4), torch.float32, CPU), ranges=4)
