"""QK norm's own facts; what holds for every operation is in test_cases.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fasttrain_kernels.qk_norm import qk_norm, qk_norm_reference
from fasttrain_kernels.qk_norm_kernels import MAX_HEAD_WIDTH, MAX_ROWS
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.calls import budget, errors, in_float64

CPU = torch.device("cpu")

with_and_without_angles = pytest.mark.parametrize("rotary", [False, True])


def arguments(
    shape: tuple[int, int, int, int] = (2, 5, 3, 8), *, rotary: bool = True, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> dict[str, Any]:
    """Arguments of `qk_norm` for [B, T, h, d]."""
    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * width, generator=generator).to(device, dtype)
    weights = 1 + torch.rand(2, width, generator=generator).to(device, dtype)
    angle = (6 * torch.rand(tokens, width // 2, generator=generator)).to(device)
    angles = {"cos": angle.cos(), "sin": angle.sin()} if rotary else {}
    return {"qkv": qkv, "q_weight": weights[0], "k_weight": weights[1], "heads": heads, **angles}


def attended(function: Callable[..., Any], values: dict[str, Any]) -> Tensor:
    """The heads put to their use: attention, [B, T, h, d]."""
    return F.scaled_dot_product_attention(*function(values)).transpose(1, 2)


def kernel(values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return qk_norm(**values, impl="triton")


def reference(values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return qk_norm_reference(**values)


def with_gradients(function: Callable[..., Tensor], values: dict[str, Any]) -> list[Tensor]:
    """The output of function(values), and the gradients of qkv and the weights of a fixed sum of it."""
    leaves = [values[name].detach().requires_grad_() for name in ("qkv", "q_weight", "k_weight")]
    output = function({**values, **dict(zip(("qkv", "q_weight", "k_weight"), leaves, strict=True))})
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def keep_the_error_budget(use: Callable[..., Tensor], values: dict[str, Any]) -> None:
    """Asserts that use(operation, values) and its gradients are as near the truth as the reference's, within the kernels' budget."""
    exact = {**values, **in_float64({name: t for name, t in values.items() if isinstance(t, Tensor)})}
    plain, truth = (with_gradients(lambda v: use(reference, v), inputs) for inputs in (values, exact))
    for ours, theirs, right in zip(with_gradients(lambda v: use(kernel, v), values), plain, truth, strict=True):
        assert all(error <= allowed for error, allowed in zip(errors(ours, right), budget(theirs, right), strict=True))


class Recorded(TorchDispatchMode):
    """The operations that run, by name, without those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not function.is_view:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_the_reference_follows_the_formulas() -> None:
    values = arguments((2, 3, 2, 4))
    qkv, turn = values["qkv"].double(), torch.complex(values["cos"].double(), values["sin"].double())
    results = qk_norm_reference(**{**values, "qkv": qkv})
    for part, (result, weight) in enumerate(zip(results[:2], (values["q_weight"], values["k_weight"]), strict=True)):
        for head in range(2):
            x = qkv[:, :, 8 * part + 4 * head :][..., :4]
            y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
            torch.testing.assert_close(result[:, head], torch.view_as_real(torch.view_as_complex(y.view(2, 3, 2, 2)) * turn).flatten(2))
    assert torch.equal(results[2].transpose(1, 2).flatten(2), qkv[..., 16:])


@pytest.mark.usefixtures("kernels")
def test_no_angle_leaves_a_token_alone(device: torch.device) -> None:
    values = arguments(device=device)
    values["cos"][1:], values["sin"][1:] = 1.0, 0.0
    turned = qk_norm(**values, impl="triton")
    plain = qk_norm(**{**values, "cos": None, "sin": None}, impl="triton")
    for ours, unturned in zip(turned[:2], plain[:2], strict=True):
        assert torch.equal(ours[:, :, 1:], unturned[:, :, 1:])
        assert not torch.equal(ours[:, :, :1], unturned[:, :, :1])


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (3, 2, 12, 64), (2, 40, 1, 128), (1, 2, 2, 300)], ids=str)
def test_any_number_of_heads_of_any_width(shape: tuple[int, int, int, int], device: torch.device) -> None:
    values = arguments(shape, rotary=shape[3] % 2 == 0, device=device)
    keep_the_error_budget(attended, values)


@pytest.mark.usefixtures("kernels")
def test_v_is_a_view_and_q_and_k_lie_as_attention_reads_them(device: torch.device) -> None:
    values = arguments(device=device)
    q, k, v = qk_norm(**values, impl="triton")
    assert v.untyped_storage().data_ptr() == values["qkv"].untyped_storage().data_ptr()
    assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()
    assert torch.equal(v, qk_norm_reference(**values)[2])


@pytest.mark.usefixtures("kernels")
def test_the_packed_gradient_is_written_once(device: torch.device) -> None:
    values = arguments(device=device)
    values["qkv"].requires_grad_()
    output = attended(kernel, values)
    upstream = torch.ones_like(output)
    with Recorded() as recorded:
        torch.autograd.grad(output, values["qkv"], upstream)
    attention, ours = recorded.names
    assert "attention" in attention and ours == "fasttrain::qk_norm_backward"


@pytest.mark.usefixtures("kernels")
@with_and_without_angles
def test_compiled_with_attention_it_is_the_same_and_moves_as_little(rotary: bool, device: torch.device) -> None:
    seen: list[str] = []

    def read(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(lambda v: attended(kernel, v), fullgraph=True, backend=aot_autograd(fw_compiler=read))
    values = arguments(rotary=rotary, device=device)
    torch.testing.assert_close(with_gradients(compiled, values), with_gradients(lambda v: attended(kernel, v), values))
    assert {"fasttrain.qk_norm.default", "fasttrain.qk_norm_backward.default"} <= set(seen)
    assert not [name for name in seen if any(word in name for word in ("zeros", "copy", "clone", "add", "cat", "scatter"))]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_that_nothing_uses_have_no_gradient(used: tuple[int, ...], compiled: bool, device: torch.device) -> None:
    def some(function: Callable[..., Any], values: dict[str, Any]) -> Tensor:
        return torch.cat([function(values)[i] for i in used])

    torch.compiler.reset()
    ours = torch.compile(some, fullgraph=True, backend="aot_eager") if compiled else some
    values = arguments(device=device)
    weights_matter = {0, 1} <= set(used)
    names = ("qkv", "q_weight", "k_weight") if weights_matter else ("qkv",)
    results = []
    for call in (lambda v: ours(kernel, v), lambda v: some(reference, v)):
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        results.append(torch.autograd.grad(call({**values, **leaves}).square().sum(), list(leaves.values())))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("kernels", "poisoned")
def test_gradients_of_any_strides_arrive(device: torch.device) -> None:
    values = arguments(device=device)
    keep_the_error_budget(lambda function, v: torch.stack([x.sum() for x in function(v)]), values)
    keep_the_error_budget(lambda function, v: torch.stack([x.mT.contiguous() for x in function(v)], -1), values)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("compiled", [False, True])
def test_it_can_be_computed_again_in_the_backward_pass(compiled: bool, device: torch.device) -> None:
    def again(v: dict[str, Any]) -> Tensor:
        return checkpoint(attended, kernel, v, use_reentrant=False)

    torch.compiler.reset()
    recomputed = torch.compile(again, fullgraph=True, backend="aot_eager") if compiled else again
    values = arguments(device=device)
    for ours, kept in zip(with_gradients(recomputed, values), with_gradients(lambda v: attended(kernel, v), values), strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.usefixtures("kernels", "poisoned")
def test_weights_may_be_of_another_type_than_qkv(device: torch.device) -> None:
    values = arguments((2, 9, 4, 24), dtype=torch.bfloat16, device=device)
    values = {**values, "q_weight": values["q_weight"].float(), "k_weight": values["k_weight"].float()}
    assert [t.dtype for t in with_gradients(lambda v: kernel(v)[0] + kernel(v)[1], values)[1:]] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    keep_the_error_budget(lambda function, v: torch.stack(function(v)), values)


@pytest.mark.usefixtures("kernels")
@with_and_without_angles
def test_the_registered_operations_pass_torchs_own_checks(rotary: bool, device: torch.device) -> None:
    values = arguments((2, 3, 2, 4), rotary=rotary, device=device)
    inputs = (values["qkv"], values["q_weight"], values["k_weight"], values.get("cos"), values.get("sin"), 2, 1e-6)
    torch.library.opcheck(torch.ops.fasttrain.qk_norm.default, inputs)
    dq, dk, dv = torch.randn(3, 2, 3, 2, 4, device=device)
    torch.library.opcheck(torch.ops.fasttrain.qk_norm_backward.default, (dq, dk, dv, *inputs))
    torch.library.opcheck(torch.ops.fasttrain.qk_norm_backward.default, (dq, dk, None, *inputs))


@pytest.mark.usefixtures("kernels")
def test_a_second_derivative_is_refused(device: torch.device) -> None:
    values = arguments((1, 1, 1, 2), device=device)
    qkv = values["qkv"].requires_grad_()
    q = kernel(values)[0]
    upstream = torch.ones_like(q, requires_grad=True)
    (gradient,) = torch.autograd.grad(q, qkv, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    qkv = torch.randn(2500, 256, 3456, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.ones(72, dtype=torch.bfloat16, device=device)
    q, k, v = qk_norm(qkv, weight, weight, heads=16, impl="triton")
    (gradient,) = torch.autograd.grad((q, k, v), qkv, (k, q, v))
    last = qkv.detach()[-1:].requires_grad_()
    outputs = qk_norm_reference(last, weight, weight, heads=16)
    torch.testing.assert_close((q[-1:], k[-1:], v[-1:]), outputs)
    (expected,) = torch.autograd.grad(outputs, last, (outputs[1].detach(), outputs[0].detach(), outputs[2].detach()))
    torch.testing.assert_close(gradient[-1:], expected)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(1, 1, 1, MAX_HEAD_WIDTH + 2), (MAX_ROWS // 16 + 1, 1, 16, 2)], ids=str)
def test_what_the_kernels_cannot_hold_or_count_is_refused(shape: tuple[int, int, int, int], device: torch.device) -> None:
    values = arguments((1, *shape[1:]), device=device)
    with pytest.raises(ValueError, match=f"takes {MAX_ROWS} heads of {MAX_HEAD_WIDTH} elements, got {shape[2]} heads of {shape[3]}"):
        qk_norm(**{**values, "qkv": values["qkv"].expand(shape[0], -1, -1)}, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, r"qkv must be \[B, T, 3 h d\] with h = heads, got \[2, 5, 72\] and heads = 5"),
        ({"heads": 0}, "heads = 0"),
        ({"qkv": torch.ones(5, 72)}, r"got \[5, 72\]"),
        ({"qkv": torch.ones(2, 5, 72, dtype=torch.int32)}, "qkv must be of a floating-point type"),
        ({"q_weight": torch.ones(7)}, r"q_weight and k_weight must both be \[8\] of one type, got \[7\]"),
        ({"k_weight": torch.ones(8, dtype=torch.bfloat16)}, "of one type"),
        ({"k_weight": torch.ones(8, device="meta")}, "k_weight is on meta"),
        ({"cos": None}, "cos and sin go together, got only sin"),
        ({"sin": None}, "cos and sin go together, got only cos"),
        ({"cos": torch.ones(5, 8)}, r"cos and sin must be \[T, d/2\] = \[5, 4\], got \[5, 8\]"),
        ({"sin": torch.ones(5, 4, requires_grad=True)}, "detach sin"),
        ({"cos": torch.ones(5, 4, dtype=torch.int64)}, "cos must be of a floating-point type"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk_norm(**{**arguments(), **change})


def test_an_odd_head_cannot_be_turned() -> None:
    values = arguments((2, 5, 3, 7))
    with pytest.raises(ValueError, match="qkv's heads have 7: leave cos and sin out"):
        qk_norm(**values)
