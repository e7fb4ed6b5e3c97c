"""What holds for every operation in CASES: kernels against the references, on every shape, type and setting."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fasttrain_kernels.cases import CASES, Case, Inputs
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISE_ERROR = 2e-6
"""How far a kernel's fp32 normal may be from the specification (philox.py)."""


def settings() -> Iterator[Any]:
    for name, case in CASES.items():
        for options in case.options:
            yield pytest.param(case, options, id="-".join([name, *map(str, options.values())]))


def settings_and_shapes() -> Iterator[Any]:
    for name, case in CASES.items():
        for options in case.options:
            for shape in case.shapes:
                yield pytest.param(case, options, shape, id="-".join(map(str, [name, *options.values(), *shape])))


def results(call: Any, inputs: Inputs, case: Case, **options: Any) -> list[Tensor]:
    """All outputs, then the gradient of every differentiable input for a fixed random upstream gradient."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    outputs = call(**{**inputs, **leaves}, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad(outputs[0], list(leaves.values()), upstream.to(outputs[0]))
    return [t.detach() for t in (*outputs, *gradients)]


def in_float64(inputs: Inputs) -> Inputs:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def assert_within_budget(kernel: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice plain PyTorch's error, in the largest and in the mean, plus a small floor for the order of fp32 sums."""
    assert kernel.dtype == plain.dtype and kernel.shape == plain.shape == truth.shape
    assert torch.isfinite(kernel).all()
    if truth.numel() == 0:
        return
    error, allowed = (kernel.double() - truth).abs(), (plain.double() - truth).abs()
    floor = (NOISE_ERROR + 8 * torch.finfo(torch.float32).eps) * truth.abs().amax().clamp(min=1e-3).item()
    assert error.max().item() <= 2 * allowed.max().item() + floor
    assert error.mean().item() <= 2 * allowed.mean().item() + floor


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "options", "shape"), settings_and_shapes())
def test_outputs_and_gradients_keep_the_error_budget(
    case: Case, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    inputs = case.inputs(shape, dtype, device)
    kernel = results(case.call, inputs, case, impl="triton", **options)
    plain = results(case.reference, inputs, case, **options)
    truth = results(case.reference, in_float64(inputs), case, **options)
    for ours, theirs, exact in zip(kernel, plain, truth, strict=True):
        assert_within_budget(ours, theirs, exact)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("case", "options"), settings())
def test_non_contiguous_inputs_give_the_same_bits(case: Case, options: dict[str, Any], device: torch.device) -> None:
    inputs = case.inputs(case.shapes[1], torch.float32, device)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] if t.dim() > 0 else t for name, t in inputs.items()}
    assert not any(t.is_contiguous() for t in strided.values() if t.dim() > 1)
    straight = results(case.call, inputs, case, impl="triton", **options)
    for ours, theirs in zip(results(case.call, strided, case, impl="triton", **options), straight, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(("case", "options"), settings())
def test_compiles_as_one_graph(case: Case, options: dict[str, Any], impl: str, device: torch.device) -> None:
    # Inductor's own code is not under test: on a CPU, where its C++ takes long to build, the graph runs as captured.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend=backend)
    inputs = case.inputs(case.shapes[1], torch.float32, device)
    eager = results(case.call, inputs, case, impl=impl, **options)
    for ours, theirs in zip(results(compiled, inputs, case, impl=impl, **options), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("case", "options"), settings())
def test_the_references_gradients_are_right(case: Case, options: dict[str, Any]) -> None:
    inputs = in_float64(case.inputs((2, 3, 5), torch.float64, torch.device("cpu")))
    leaves = [inputs[name].requires_grad_() for name in case.differentiable]

    def differentiated(*values: Tensor) -> Tensor:
        output = case.reference(**{**inputs, **dict(zip(case.differentiable, values, strict=True))}, **options)
        return output if isinstance(output, Tensor) else output[0]

    assert torch.autograd.gradcheck(differentiated, leaves)


@pytest.mark.parametrize(("case", "options"), settings())
def test_a_kernel_asked_for_on_the_cpu_is_refused(case: Case, options: dict[str, Any]) -> None:
    inputs = case.inputs(case.shapes[0], torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        case.call(**inputs, **options, impl="triton")


@pytest.mark.parametrize(("case", "options"), settings())
def test_auto_on_the_cpu_is_the_reference(case: Case, options: dict[str, Any]) -> None:
    inputs = case.inputs(case.shapes[1], torch.bfloat16, torch.device("cpu"))
    for ours, theirs in zip(results(case.call, inputs, case, **options), results(case.reference, inputs, case, **options), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "options"), settings())
def test_two_runs_give_the_same_bits(case: Case, options: dict[str, Any], device: torch.device) -> None:
    shape = (64, 256, 1152) if "x" in case.differentiable else (64, 4, 32, 32)
    inputs = case.inputs(shape, torch.bfloat16, device)
    first = results(case.call, inputs, case, impl="triton", **options)
    for again, once in zip(results(case.call, inputs, case, impl="triton", **options), first, strict=True):
        assert torch.equal(again, once)
