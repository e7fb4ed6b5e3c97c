"""Noising's own facts; what holds for every operation is in test_cases.py."""

import pytest
import torch
from fasttrain_kernels.cases.noise import noising_inputs
from fasttrain_kernels.noising import noising
from fasttrain_kernels.philox import Purpose, _box_muller, normal, philox

CPU = torch.device("cpu")


def test_equals_the_formula_in_float64() -> None:
    inputs = noising_inputs((3, 2, 5), torch.float64, CPU)
    alpha, sigma = (inputs[name][:, None, None].double() for name in ("alpha", "sigma"))
    eps = normal(inputs["seed"], inputs["position"], (2, 5)).double()
    assert torch.equal(noising(**inputs), alpha * inputs["x0"] + sigma * eps)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_result_has_the_asked_type(impl: str, device: torch.device) -> None:
    inputs = noising_inputs((2, 3, 4), torch.float32, device)
    exact = noising(**inputs, impl=impl)
    rounded = noising(**inputs, dtype=torch.bfloat16, impl=impl)
    assert torch.equal(rounded, exact.to(torch.bfloat16))


@pytest.mark.usefixtures("kernels")
def test_each_sample_is_its_own(device: torch.device) -> None:
    inputs = noising_inputs((4, 3, 7), torch.float32, device)
    together = noising(**inputs, impl="triton")
    for b in range(4):
        one = {name: t if t.dim() == 0 else t[b : b + 1] for name, t in inputs.items()}
        assert torch.equal(noising(**one, impl="triton")[0], together[b])


@pytest.mark.usefixtures("kernels")
def test_the_registered_operation_passes_torchs_own_checks(device: torch.device) -> None:
    inputs = noising_inputs((2, 3, 5), torch.float32, device)
    torch.library.opcheck(torch.ops.fasttrain.noising.default, (*inputs.values(), torch.bfloat16))
    grad = torch.rand(2, 3, 5, device=device)
    torch.library.opcheck(torch.ops.fasttrain.noising_backward.default, (grad, inputs["alpha"], torch.bfloat16))


@pytest.mark.usefixtures("kernels")
def test_the_gradient_is_rounded_once_to_x0s_type(device: torch.device) -> None:
    inputs = noising_inputs((3, 2, 5), torch.bfloat16, device)
    x0 = inputs.pop("x0").requires_grad_()
    upstream = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).to(device)
    (grad,) = torch.autograd.grad(noising(x0, **inputs, dtype=torch.float32, impl="triton"), x0, upstream)
    assert torch.equal(grad, (inputs["alpha"][:, None, None] * upstream).to(torch.bfloat16))


def test_more_than_2_to_the_31_elements_in_one_sample() -> None:
    """Only the last program runs, so that of the memory only its own is touched."""
    pytest.importorskip("triton")
    from tests.kernels.interpreter import recording, run_program

    size, position = 2**31 + 8, torch.tensor([2**33 + 5])
    x0 = torch.empty(1, size, dtype=torch.float16)
    x0[0, -4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with recording() as launches:
        x_t = noising(x0, torch.full((1,), 0.5), torch.full((1,), 2.0), 3, position, dtype=torch.float32, impl="triton")
    run_program(launches[0], (launches[0].grid[0] - 1,))
    words = philox(3, size // 4 - 1, Purpose.NOISE, position)
    eps = torch.cat([*_box_muller(*words[:2]), *_box_muller(*words[2:])])
    torch.testing.assert_close(x_t[0, -4:], 0.5 * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 2 * eps, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_graph_follows_seed_and_position(device: torch.device) -> None:
    inputs = noising_inputs((4, 4, 32, 32), torch.bfloat16, device)
    noising(**inputs, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = noising(**inputs, impl="triton")
    inputs["seed"].add_(1)
    inputs["position"].add_(2**33)
    graph.replay()
    assert torch.equal(captured, noising(**inputs, impl="triton"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha", torch.ones(3), r"alpha must be \[2\], one value a sample, got \[3\]"),
        ("sigma", torch.ones(2, 1), r"sigma must be \[2\]"),
        ("sigma", torch.ones(2, dtype=torch.int64), "sigma must be of a floating-point type"),
        ("position", torch.zeros(3, dtype=torch.int64), r"position must be \[2\]"),
        ("position", torch.zeros(2), "position int64"),
        ("seed", torch.zeros(2, dtype=torch.int64), "seed must be one int64"),
        ("seed", torch.tensor(1, device="meta"), "seed is on meta, the other tensors on cpu"),
        ("alpha", torch.ones(2, requires_grad=True), "only x0 gets a gradient: detach alpha"),
        ("x0", torch.ones(2), r"x0 must be \[B, ...\], got \[2\]"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: torch.Tensor, message: str) -> None:
    inputs = noising_inputs((2, 3, 4), torch.float32, CPU)
    with pytest.raises(ValueError, match=message):
        noising(**{**inputs, name: value})
