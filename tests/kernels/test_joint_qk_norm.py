"""Joint QK norm's own facts; what holds for every operation is in test_cases.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fasttrain_kernels.joint_qk_norm import joint_qk_norm, joint_qk_norm_reference
from fasttrain_kernels.qk_norm import qk_norm
from fasttrain_kernels.qk_norm_kernels import MAX_HEAD_WIDTH, MAX_ROWS
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.kernels.calls import upstream
from tests.kernels.test_qk_norm import Recorded
from tests.kernels.within_budget import require_within_budget

CPU = torch.device("cpu")
INPUTS = ("qkv_text", "qkv_image", "q_weight_text", "k_weight_text", "q_weight_image", "k_weight_image")
Values = dict[str, Any]

with_and_without_angles = pytest.mark.parametrize("rotary", [False, True])


def arguments(
    shape: tuple[int, int, int, int, int] = (2, 3, 5, 3, 8),
    *,
    rotary: bool = True,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    device: torch.device = CPU,
) -> Values:
    """Arguments of `joint_qk_norm` for [B, M, N, h, d]."""
    batch, text, image, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(batch, tokens, 3 * heads * width, generator=generator).to(device, dtype) for tokens in (text, image)]
    learned = 1 + torch.rand(4, width, generator=generator).to(device, weights or dtype)
    angle = (6 * torch.rand(image, width // 2, generator=generator)).to(device)
    angles = {"cos": angle.cos(), "sin": angle.sin()} if rotary else {}
    return {**dict(zip(INPUTS, [*qkv, *learned], strict=True)), "heads": heads, **angles}


def kernel(values: Values) -> tuple[Tensor, Tensor, Tensor]:
    return joint_qk_norm(**values, impl="triton")


def attended(function: Callable[..., Any], values: Values) -> Tensor:
    """The heads put to their use: attention over both sequences, [B, M + N, h, d]."""
    return F.scaled_dot_product_attention(*function(values)).transpose(1, 2)


def with_gradients(function: Callable[..., Any], values: Values) -> list[Tensor]:
    """The outputs of function(values), and the gradients of all inputs for fixed random upstream gradients."""
    leaves = {name: values[name].detach().requires_grad_() for name in INPUTS}
    returned = function({**values, **leaves})
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream(outputs)))]


def keep_the_error_budget(use: Callable[..., Any], values: Values) -> None:
    """Asserts that use(operation, values) and its gradients are as near the truth as the reference's, within the kernels' budget."""
    constant = {name: value for name, value in values.items() if name not in INPUTS}
    ours, plain = (
        lambda function=function, **given: use(function, {**given, **constant})
        for function in (kernel, lambda v: joint_qk_norm_reference(**v))
    )
    require_within_budget(ours, plain, {name: values[name] for name in INPUTS})


def launched(action: Callable[[], Any], processors: int = 1) -> list[Any]:
    """The launches that the action would make on a GPU of so many processors."""
    pytest.importorskip("triton")
    from tests.kernels.interpreter import launching_for, recording

    with recording() as launches, launching_for(processors):
        action()
    return launches


def test_the_reference_follows_the_formulas() -> None:
    values = arguments((2, 2, 3, 2, 4))
    turns = [torch.ones(2, 2), torch.complex(values["cos"], values["sin"])]
    double = {name: values[name].double() for name in INPUTS}
    results = joint_qk_norm_reference(**{**values, **double})
    for tokens, of, turn in ((slice(0, 2), "text", turns[0]), (slice(2, 5), "image", turns[1])):
        qkv = double[f"qkv_{of}"].unflatten(2, (3, 2, 4))  # [B, T, 3, h, d]
        for part, name in enumerate("qk"):
            x = qkv[:, :, part]
            y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * double[f"{name}_weight_{of}"]
            turned = torch.view_as_complex(y.unflatten(3, (2, 2))) * turn[:, None]
            torch.testing.assert_close(results[part][:, :, tokens].transpose(1, 2), torch.view_as_real(turned).flatten(3))
        assert torch.equal(results[2][:, :, tokens].transpose(1, 2), qkv[:, :, 2])


@pytest.mark.usefixtures("kernels", "poisoned")
@with_and_without_angles
def test_it_is_two_single_ones_behind_each_other_bit_for_bit(rotary: bool, device: torch.device) -> None:
    def apart(values: Values) -> list[Tensor]:
        angles = {name: values.get(name) for name in ("cos", "sin")}
        single = [
            qk_norm(*(values[f"{name}_{of}"] for name in ("qkv", "q_weight", "k_weight")), heads=values["heads"], impl="triton", **turned)
            for of, turned in (("text", {}), ("image", angles))
        ]
        return [torch.cat(pair, dim=2) for pair in zip(*single, strict=True)]

    values = arguments((2, 19, 40, 3, 72), rotary=rotary, dtype=torch.bfloat16, weights=torch.float32, device=device)
    ours, theirs = with_gradients(kernel, values), with_gradients(apart, values)
    for value, same in zip(ours[:5], theirs[:5], strict=True):
        assert torch.equal(value, same)
    torch.testing.assert_close(ours[5:], theirs[5:])  # summed by programs that own other rows


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 4, 3, 8), (3, 77, 3, 1, 5), (2, 0, 5, 2, 6), (2, 5, 0, 2, 6), (1, 1, 1, 1, 1), (5, 3, 2, 12, 64), (1, 2, 3, 2, 300)],
    ids=str,
)
def test_any_lengths_of_heads_of_any_width(shape: tuple[int, int, int, int, int], device: torch.device) -> None:
    keep_the_error_budget(attended, arguments(shape, rotary=shape[4] % 2 == 0, device=device))


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("gap", [0, 8, 5], ids=["one behind the other", "whole heads between", "not whole heads between"])
def test_views_with_gaps_give_the_same_bits_and_are_not_copied(gap: int, device: torch.device) -> None:
    values = arguments(device=device)
    wide = torch.full((2, 8, 72 + gap), 9.0, device=device)
    wide[:, :3, :72], wide[:, 3:, :72] = values["qkv_text"], values["qkv_image"]
    views = {**values, "qkv_text": wide[:, :3, :72], "qkv_image": wide[:, 3:, :72]}
    for value, same in zip(with_gradients(kernel, views), with_gradients(kernel, values), strict=True):
        assert torch.equal(value, same)
    launch = launched(lambda: kernel(views))[0]
    for name in ("qkv_text", "qkv_image"):
        assert (launch.bound()[name].data_ptr() == views[name].data_ptr()) is (gap != 5)


@pytest.mark.usefixtures("kernels")
def test_gradients_are_read_where_attention_leaves_them_and_written_once(device: torch.device) -> None:
    values = arguments(device=device)
    leaves = [values[name].requires_grad_() for name in INPUTS]
    output = attended(kernel, values)
    gradient = torch.ones_like(output)
    with Recorded() as recorded:
        torch.autograd.grad(output, leaves, gradient)
    attention, ours = recorded.names
    assert "attention" in attention and ours == "fasttrain::joint_qk_norm_backward"


@pytest.mark.usefixtures("kernels", "poisoned")
def test_gradients_of_any_strides_arrive(device: torch.device) -> None:
    values = arguments(device=device)
    leaves = [values[name].requires_grad_() for name in INPUTS]
    outputs = kernel(values)
    plain = torch.randn(3, *outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(device).unbind()
    by_head = [g.contiguous() for g in plain]  # [B, h, T, d] in memory
    by_token = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in plain]
    by_element = [g.mT.contiguous().mT for g in plain]
    mixed = [by_head[0], by_token[1], by_element[2]]
    found = [torch.autograd.grad(outputs, leaves, way, retain_graph=True) for way in (by_head, by_token, by_element, mixed)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for way, read in ((by_head, True), (by_token, True), (by_element, False), (mixed, False)):
        launch = launched(lambda way=way: torch.autograd.grad(outputs, leaves, way, retain_graph=True))[0]
        assert (launch.bound()["dq"].data_ptr() == way[0].data_ptr()) is read


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
    assert {"fasttrain.joint_qk_norm.default", "fasttrain.joint_qk_norm_backward.default"} <= set(seen)
    assert not [name for name in seen if any(word in name for word in ("zeros", "copy", "clone", "add", "cat", "scatter"))]


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_outputs_that_nothing_uses_have_no_gradient(used: tuple[int, ...], device: torch.device) -> None:
    values = arguments(device=device)
    leaves = [values[name].requires_grad_() for name in INPUTS]
    outputs = kernel(values), joint_qk_norm_reference(**values)
    ours, theirs = (
        torch.autograd.grad(torch.cat([each[i] for i in used]).square().sum(), leaves, materialize_grads=True) for each in outputs
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("compiled", [False, True])
def test_it_can_be_computed_again_in_the_backward_pass(compiled: bool, device: torch.device) -> None:
    def again(v: Values) -> Tensor:
        return checkpoint(attended, kernel, v, use_reentrant=False)

    torch.compiler.reset()
    recomputed = torch.compile(again, fullgraph=True, backend="aot_eager") if compiled else again
    values = arguments(device=device)
    for ours, kept in zip(with_gradients(recomputed, values), with_gradients(lambda v: attended(kernel, v), values), strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.usefixtures("kernels", "poisoned")
def test_weights_may_be_of_another_type_than_qkv(device: torch.device) -> None:
    values = arguments((2, 3, 9, 4, 24), dtype=torch.bfloat16, weights=torch.float32, device=device)
    assert [t.dtype for t in with_gradients(kernel, values)] == 5 * [torch.bfloat16] + 4 * [torch.float32]
    keep_the_error_budget(lambda function, v: function(v), values)


@pytest.mark.usefixtures("kernels")
@with_and_without_angles
def test_the_registered_operations_pass_torchs_own_checks(rotary: bool, device: torch.device) -> None:
    values = arguments((2, 2, 3, 2, 4), rotary=rotary, device=device)
    inputs = (*(values[name] for name in INPUTS), values.get("cos"), values.get("sin"), 2, 1e-6)
    torch.library.opcheck(torch.ops.fasttrain.joint_qk_norm.default, inputs)
    dq, dk, dv = torch.randn(3, 2, 5, 2, 4, device=device)
    torch.library.opcheck(torch.ops.fasttrain.joint_qk_norm_backward.default, (dq, dk, dv, *inputs))
    torch.library.opcheck(torch.ops.fasttrain.joint_qk_norm_backward.default, (dq, dk, None, *inputs))


@pytest.mark.usefixtures("kernels")
def test_a_second_derivative_is_refused(device: torch.device) -> None:
    values = arguments((1, 1, 1, 1, 2), device=device)
    image = values["qkv_image"].requires_grad_()
    q = kernel(values)[0]
    (gradient,) = torch.autograd.grad(q, image, torch.ones_like(q, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("text", "heads", "width"), [(1, 16, 72), (77, 16, 72), (77, 18, 64)])
def test_machine_code_for_a_class_and_for_a_caption(text: int, heads: int, width: int, architecture: str) -> None:
    ahead_of_time = pytest.importorskip("tests.kernels.ahead_of_time", reason="needs Triton")
    values = arguments((4, text, 256, heads, width), dtype=torch.bfloat16)
    forward, backward, _ = launched(lambda: with_gradients(kernel, values), 132)
    for launch, least in ((forward, 2 * 6), (backward, 2 * 9)):
        compiled = ahead_of_time.compile_launch(launch, architecture)
        accesses = [size for _, size in compiled.global_accesses]
        assert compiled.spilled_bytes == 0
        # On both sides of the branch q, k and v are read and written, or read, their gradients read, and those of qkv written.
        assert accesses.count(16) >= least and min(accesses) >= 4
        assert not compiled.narrow_offsets & {"qkv_text", "qkv_image", "q", "k", "v", "dq", "dk", "dv", "dqkv_text", "dqkv_image"}


def test_a_backward_grid_is_never_more_than_a_wave() -> None:
    for text, image in ((0, 40), (40, 0), (1, 256), (77, 256), (3, 5), (64, 64), (230, 270)):
        values = arguments((3, text, image, 4, 8), rotary=False)
        (programs,) = launched(lambda values=values: with_gradients(kernel, values), 4)[1].grid
        assert programs <= 3 * 4, (text, image)


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 64 * 2**30:
        pytest.skip("needs 64 GiB of free GPU memory")
    values = arguments((2, 256, 256, 16, 72), dtype=torch.bfloat16, device=device)
    leaves = {name: values[name].repeat(1250, 1, 1).requires_grad_() for name in INPUTS[:2]}
    q, k, v = kernel({**values, **leaves})
    gradients = torch.autograd.grad((q, k, v), list(leaves.values()), (k, q, v))
    last = {name: t.detach()[-1:].requires_grad_() for name, t in leaves.items()}
    outputs = joint_qk_norm_reference(**{**values, **last})
    torch.testing.assert_close((q[-1:], k[-1:], v[-1:]), outputs)
    expected = torch.autograd.grad(outputs, list(last.values()), [outputs[i].detach() for i in (1, 0, 2)])
    torch.testing.assert_close([g[-1:] for g in gradients], list(expected))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, MAX_HEAD_WIDTH + 2), (MAX_ROWS // 32 + 1, 1, 1, 16, 2)], ids=str)
def test_what_the_kernels_cannot_hold_or_count_is_refused(shape: tuple[int, ...], device: torch.device) -> None:
    values = arguments((1, *shape[1:]), device=device)
    many = {name: values[name].expand(shape[0], -1, -1) for name in INPUTS[:2]}
    with pytest.raises(ValueError, match=f"takes {MAX_ROWS} heads of {MAX_HEAD_WIDTH} elements, got {shape[3]} heads of {shape[4]}"):
        kernel({**values, **many})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, r"qkv_text must be \[B, T, 3 h d\] with h = heads, got \[2, 3, 72\] and heads = 5"),
        ({"qkv_image": torch.ones(5, 72)}, r"qkv_image must be .* got \[5, 72\]"),
        ({"qkv_image": torch.ones(3, 5, 72)}, r"may differ in tokens only, got \[2, 3, 72\] and \[3, 5, 72\]"),
        ({"qkv_image": torch.ones(2, 5, 72, dtype=torch.bfloat16)}, "qkv of text and image must be of one type, got torch.float32 and"),
        ({"qkv_image": torch.ones(2, 5, 72, dtype=torch.int32)}, "qkv_image must be of a floating-point type"),
        ({"q_weight_text": torch.ones(7)}, r"q_weight_text and k_weight_text must both be \[8\] of one type, got \[7\]"),
        ({"k_weight_image": torch.ones(8, device="meta")}, "k_weight_image is on meta"),
        ({name: torch.ones(8).double() for name in INPUTS[4:]}, "weights of text and image must be of one type"),
        ({"cos": None}, "cos and sin go together, got only sin"),
        ({"cos": torch.ones(8, 4)}, r"cos and sin must be \[T, d/2\] = \[5, 4\], got \[8, 4\]"),
        ({"sin": torch.ones(5, 4, requires_grad=True)}, "detach sin"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint_qk_norm(**{**arguments(), **change})
