"""AdaLN's own facts; what holds for every operation is in test_cases.py."""

import pytest
import torch
from fasttrain_kernels.adaln import adaln, adaln_reference
from fasttrain_kernels.cases.norms import adaln_inputs
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.norm import MAX_WIDTH
from torch.nn import functional as F

CPU = torch.device("cpu")


def test_without_modulation_it_is_the_norm() -> None:
    x = torch.randn(2, 3, 8)
    none = torch.zeros(2, 8)
    assert torch.equal(adaln(x, none, none), F.layer_norm(x, (8,), eps=1e-6))
    assert torch.equal(adaln(x, none, none, norm="rms"), F.rms_norm(x, (8,), eps=1e-6))


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_chunks_of_one_modulation_matrix_are_read_in_place(norm: str, device: torch.device) -> None:
    x = adaln_inputs((3, 4, 48), torch.float32, device)["x"]
    modulation = torch.randn(3, 6 * 48, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    gradients = []
    for impl in ("triton", "reference"):
        chunks = modulation.chunk(6, dim=1)
        y = adaln(x, chunks[4], chunks[1], norm=norm, impl=impl)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), modulation)))
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("kernels")
def test_a_sum_over_many_tokens_and_programs(device: torch.device) -> None:
    inputs = {name: t.requires_grad_() for name, t in adaln_inputs((2, 37, 40), torch.float32, device).items()}
    gradients = [torch.autograd.grad(adaln(**inputs, impl=impl).square().sum(), list(inputs.values())) for impl in ("triton", "reference")]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_statistics_survive_a_mean_far_from_zero(device: torch.device) -> None:
    x = 1000 + torch.randn(1, 2, 384, generator=torch.Generator().manual_seed(0)).to(device)
    none = torch.zeros(1, 384, device=device)
    exact = adaln_reference(x.double(), none.double(), none.double())
    assert (adaln(x, none, none, impl="triton") - exact).abs().max() < 1e-3


@pytest.mark.usefixtures("kernels")
def test_scale_may_be_of_another_type_than_x(device: torch.device) -> None:
    x = adaln_inputs((2, 3, 32), torch.bfloat16, device)["x"]
    rows = adaln_inputs((2, 3, 32), torch.float32, device)
    scale, shift = rows["scale"].requires_grad_(), rows["shift"]
    results = []
    for impl in ("triton", "reference"):
        y = adaln(x, scale, shift, impl=impl)
        results.append((y, *torch.autograd.grad(y.float().sum(), scale)))
    assert results[0][1].dtype == torch.float32
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    batch, tokens, width = 8, 262_144, 1152
    x = torch.randn(batch, tokens, width, dtype=torch.bfloat16, device=device)
    scale, shift = torch.randn(2, batch, width, dtype=torch.bfloat16, device=device)
    last = adaln(x, scale, shift, impl="triton")[-1:]
    torch.testing.assert_close(last, adaln_reference(x[-1:], scale[-1:], shift[-1:]))


@pytest.mark.usefixtures("kernels")
def test_a_width_beyond_the_registers_is_refused(device: torch.device) -> None:
    inputs = adaln_inputs((1, 1, MAX_WIDTH + 1), torch.float32, device)
    assert choose("triton", inputs["x"]) == "triton"
    with pytest.raises(ValueError, match=f"D = {MAX_WIDTH + 1}"):
        adaln(**inputs, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "unknown norm 'batch'; known: layer, rms"),
        ({"x": torch.ones(2, 8)}, r"x must be \[B, T, D\]"),
        ({"scale": torch.ones(2, 7)}, r"got \[2, 3, 8\], \[2, 7\]"),
        ({"shift": torch.ones(2, 8, dtype=torch.bfloat16)}, "of one type"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int32)}, "x must be of a floating-point type"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; known: auto, triton, reference"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaln(**{**adaln_inputs((2, 3, 8), torch.float32, CPU), **change})
