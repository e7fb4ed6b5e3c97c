"""Gated AdaLN's own facts; what it shares with the other norms is in test_norm.py, what holds for every operation in test_cases.py."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from fasttrain_kernels.adaln import adaln
from fasttrain_kernels.cases.norms import gated_adaln_inputs
from fasttrain_kernels.gated_adaln import gated_adaln, gated_adaln_reference
from fasttrain_kernels.norm import MAX_WIDTH
from torch import Tensor

from tests.kernels.within_budget import require_within_budget

CPU = torch.device("cpu")

both_norms = pytest.mark.parametrize("norm", ["layer", "rms"])


def loss(x_new: Tensor, y: Tensor) -> Tensor:
    return x_new.float().square().sum() + (3 * y.float()).sin().sum()


@both_norms
def test_a_closed_gate_is_adaln(norm: str) -> None:
    x, branch, gate, scale, shift = gated_adaln_inputs((2, 3, 8), torch.float32, CPU).values()
    x_new, y = gated_adaln(x, branch, torch.zeros_like(gate), scale, shift, norm=norm)
    assert torch.equal(x_new, x) and torch.equal(y, adaln(x, scale, shift, norm=norm))


@pytest.mark.usefixtures("kernels", "poisoned")
@both_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_and_unfused_give_the_same_bits(norm: str, dtype: torch.dtype, device: torch.device) -> None:
    x, branch, gate, scale, shift = gated_adaln_inputs((3, 5, 72), dtype, device).values()
    # Gates that are powers of 2 make the product exact: a fused multiply-add then rounds as two operations do.
    gate = torch.exp2(torch.randint(-3, 3, gate.shape, generator=torch.Generator().manual_seed(5)).to(device)).to(dtype)
    x_new, y = gated_adaln(x, branch, gate, scale, shift, norm=norm, impl="triton")
    added = x + gate[:, None] * branch
    assert torch.equal(x_new, added)
    assert torch.equal(y, adaln(added, scale, shift, norm=norm, impl="triton"))


@pytest.mark.usefixtures("kernels", "poisoned")
@both_norms
def test_fused_and_unfused_give_the_same_gradients(norm: str, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in gated_adaln_inputs((3, 5, 72), torch.float32, device).values()]
    x, branch, gate, scale, shift = leaves
    added = x + gate[:, None] * branch
    unfused = loss(added, adaln(added, scale, shift, norm=norm, impl="triton"))
    fused = loss(*gated_adaln(*leaves, norm=norm, impl="triton"))
    torch.testing.assert_close(torch.autograd.grad(fused, leaves), torch.autograd.grad(unfused, leaves))


@pytest.mark.usefixtures("kernels", "poisoned")
@both_norms
def test_chunks_of_one_modulation_matrix_get_one_gradient(norm: str, device: torch.device) -> None:
    def called(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(x: Tensor, branch: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
            _, _, gate, shift, scale, _ = modulation.chunk(6, dim=1)
            return gated_adaln(x, branch, gate, scale, shift, norm=norm, impl=impl)

        return call

    x, branch, *_ = gated_adaln_inputs((3, 4, 48), torch.float32, device).values()
    modulation = torch.randn(3, 6 * 48, generator=torch.Generator().manual_seed(3)).to(device)
    require_within_budget(called("triton"), called("reference"), {"x": x, "branch": branch, "modulation": modulation})


@pytest.mark.usefixtures("kernels")
def test_statistics_survive_a_mean_far_from_zero(device: torch.device) -> None:
    x, branch, gate, scale, shift = gated_adaln_inputs((2, 3, 384), torch.float32, device).values()
    inputs = (x + 1000, branch, gate, scale, shift)
    _, exact = gated_adaln_reference(*(t.double() for t in inputs))
    _, y = gated_adaln(*inputs, impl="triton")
    _, plain = gated_adaln_reference(*inputs)
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize(("tokens", "rows"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_modulation_may_be_of_another_type_than_x(tokens: torch.dtype, rows: torch.dtype, device: torch.device) -> None:
    inputs = gated_adaln_inputs((2, 3, 32), torch.float32, device)
    types = {"x": tokens, "branch": tokens, "gate": rows, "scale": rows, "shift": rows}
    require_within_budget(
        partial(gated_adaln, impl="triton"), gated_adaln_reference, {name: t.to(types[name]) for name, t in inputs.items()}
    )


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    batch, tokens, width = 8, 262_144, 1152
    x, branch = (torch.randn(batch, tokens, width, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(2))
    gate, scale, shift = torch.randn(3, batch, width, dtype=torch.bfloat16, device=device)
    x_new, y = gated_adaln(x, branch, gate, scale, shift, impl="triton")
    torch.autograd.backward([x_new, y], [x_new, y])
    last = [t[-1:, -64:].detach().requires_grad_() for t in (x, branch)]
    expected = gated_adaln_reference(*last, gate[-1:], scale[-1:], shift[-1:])
    torch.testing.assert_close((x_new[-1:, -64:], y[-1:, -64:]), expected)
    torch.autograd.backward(expected, [t.detach() for t in expected])
    assert x.grad is not None and branch.grad is not None
    torch.testing.assert_close([t[-1:, -64:] for t in (x.grad, branch.grad)], [t.grad for t in last], rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("kernels")
def test_a_width_beyond_the_registers_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"D = {MAX_WIDTH + 1}"):
        gated_adaln(**gated_adaln_inputs((1, 1, MAX_WIDTH + 1), torch.float32, device), impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "unknown norm 'batch'; known: layer, rms"),
        ({"x": torch.ones(2, 8), "branch": torch.ones(2, 8)}, r"x and branch must be \[B, T, D\]"),
        ({"branch": torch.ones(2, 4, 8)}, r"got \[2, 3, 8\] torch.float32 and \[2, 4, 8\]"),
        ({"branch": torch.ones(2, 3, 8, dtype=torch.bfloat16)}, "of one type, got .* torch.bfloat16"),
        ({"gate": torch.ones(3, 8)}, r"gate, scale and shift must be \[B, D\] of one type beside x \[2, 3, 8\], got \[3, 8\]"),
        ({"scale": torch.ones(2, 7)}, r"got \[2, 8\] torch.float32, \[2, 7\]"),
        ({"shift": torch.ones(2, 8, dtype=torch.bfloat16)}, r"\[2, 8\] torch.bfloat16"),
        ({"branch": torch.ones(2, 3, 8, dtype=torch.int32)}, "branch must be of a floating-point type"),
        ({"gate": torch.ones(2, 8, device="meta")}, "gate is on meta"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; known: auto, triton, reference"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_adaln(**{**gated_adaln_inputs((2, 3, 8), torch.float32, CPU), **change})
