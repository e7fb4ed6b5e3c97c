"""What holds for every operation in CASES: kernels against the references, on every shape, type and setting."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fasttrain_kernels.cases import CASES, Case
from fasttrain_kernels.dispatch import OPERATIONS
from torch import Tensor

from tests.kernels.calls import budget, errors, forward, in_float64, outputs_of, results, upstream

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Compilers have gone wrong at a batch of 1 alone (PyTorch issue 193061), where a size is a constant. Without a GPU no code is generated,
# the graph is captured and runs as it is: there the harder batch does for both.
COMPILED_BATCHES = (1, 2) if torch.cuda.is_available() else (1,)


def settings() -> Iterator[Any]:
    for name, case in CASES.items():
        for options in case.options:
            yield pytest.param(case, options, id="-".join([name, *map(str, options.values())]))


def settings_and_shapes() -> Iterator[Any]:
    for name, case in CASES.items():
        for options in case.options:
            for shape in case.shapes:
                yield pytest.param(case, options, shape, id="-".join(map(str, [name, *options.values(), *shape])))


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
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == exact.shape
        assert torch.isfinite(ours).all()
        if exact.numel() > 0:
            allowed = budget(theirs, exact, drawn="seed" in inputs)
            assert all(error <= most for error, most in zip(errors(ours, exact), allowed, strict=True))


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(OPERATIONS)
    for name, case in CASES.items():
        assert {1, 2, 5} <= {shape[0] for shape in case.shapes}, name


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
@pytest.mark.parametrize("batch", COMPILED_BATCHES)
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(("case", "options"), settings())
def test_compiles_as_one_graph(case: Case, options: dict[str, Any], impl: str, batch: int, device: torch.device) -> None:
    # Inductor's own code is not under test: on a CPU, where its C++ takes long to build, the graph runs as captured.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend=backend)
    inputs = case.inputs((batch, *case.shapes[1][1:]), torch.float32, device)
    eager = results(case.call, inputs, case, impl=impl, **options)
    for ours, theirs in zip(results(compiled, inputs, case, impl=impl, **options), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("case", "options"), [param for param in settings() if param.values[0].differentiable])
def test_the_references_gradients_are_right(case: Case, options: dict[str, Any]) -> None:
    inputs = in_float64(case.inputs(case.tiny, torch.float64, torch.device("cpu")))
    leaves = [inputs[name].requires_grad_() for name in case.differentiable]

    def differentiated(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = outputs_of(case.reference, {**inputs, **dict(zip(case.differentiable, values, strict=True))}, **options)
        return tuple(output for output in outputs if output.requires_grad)

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
    inputs = case.inputs((64, *case.real[0]), torch.bfloat16, device)
    first = results(case.call, inputs, case, impl="triton", **options)
    for again, once in zip(results(case.call, inputs, case, impl="triton", **options), first, strict=True):
        assert torch.equal(again, once)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "options"), settings())
def test_a_cuda_graph_replays_with_new_inputs(case: Case, options: dict[str, Any], device: torch.device) -> None:
    inputs = case.inputs((2, *case.real[0]), torch.bfloat16, device)
    ends = upstream([output for output in forward(case.call, inputs, case, impl="triton", **options)[0] if output.requires_grad])

    def forward_and_backward() -> list[Tensor]:
        outputs, leaves = forward(case.call, inputs, case, impl="triton", **options)
        roots = [output for output in outputs if output.requires_grad]
        return [t.detach() for t in (*outputs, *(torch.autograd.grad(roots, leaves, ends) if leaves else ()))]

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        forward_and_backward()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward()
    before = [t.clone() for t in forward_and_backward()]
    for tensor in inputs.values():
        change(tensor)
    graph.replay()
    replayed = [t.clone() for t in captured]
    eager = forward_and_backward()
    for ours, theirs in zip(replayed, eager, strict=True):
        assert torch.equal(ours, theirs)
    assert not all(torch.equal(ours, old) for ours, old in zip(replayed, before, strict=True))


def change(tensor: Tensor) -> None:
    """Other values of the same kind, in place: numbers scaled, positions and ranges dealt to other samples, another seed."""
    if tensor.is_floating_point():
        tensor.mul_(0.75)
    elif tensor.dim() > 0:
        tensor.copy_(tensor.roll(1, 0))
    else:
        tensor.add_(1)
