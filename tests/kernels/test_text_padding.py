"""Padding of captions: its own facts; what holds for every operation is in test_cases.py."""

import pytest
import torch
from fasttrain_kernels.language import HAS_TRITON
from fasttrain_kernels.philox import Purpose, normal
from fasttrain_kernels.text_padding import MAX_PLACES, MAX_SIZE, text_padding, text_padding_reference
from torch import Tensor

POSITION = torch.tensor([5, 2**40])


def captions(device: torch.device | str = "cpu") -> Tensor:
    """[2, 8, 12], of any content."""
    return torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0)).to(device)


def test_the_reference_follows_the_formula() -> None:
    x, length = captions(), torch.tensor([3, 8])
    y = text_padding_reference(x, length, 7, POSITION, noise=0.1)
    eps = normal(7, POSITION, (8, 12), Purpose.TEXT_PADDING)
    for place in range(8):
        sigma = x[0, :3].double().std(0, correction=0)
        expected = x[0, place % 3] + 0.1 * (8 / 3 - 1) ** 0.5 * sigma * eps[0, place]
        torch.testing.assert_close(y[0, place].double(), expected)
    assert torch.equal(y[1], x[1])  # a caption that fills its places is left alone


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_without_noise_the_tokens_come_again_as_they_are(impl: str, device: torch.device) -> None:
    x = captions(device)
    y = text_padding(x.half(), torch.tensor([3, 1], device=device), 7, POSITION.to(device), noise=0.0, impl=impl)
    for place in range(8):
        assert torch.equal(y[:, place], torch.stack([x[0, place % 3], x[1, 0]]).half().float())


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_what_is_behind_a_caption_counts_for_nothing(impl: str, device: torch.device) -> None:
    x, length = captions(device), torch.tensor([3, 5], device=device)
    blank = x.clone()
    blank[0, 3:], blank[1, 5:] = float("nan"), float("inf")
    ours, theirs = (text_padding(tokens, length, 7, POSITION.to(device), impl=impl) for tokens in (blank, x))
    assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_token_is_taken_as_one_and_too_many_as_all(impl: str, device: torch.device) -> None:
    x, position = captions(device), POSITION.to(device)
    odd, plain = (text_padding(x, torch.tensor(n, device=device), 7, position, impl=impl) for n in ((0, 9), (1, 8)))
    assert torch.equal(odd, plain)


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_a_large_mean_costs_the_deviation_no_digits(mean: float, device: torch.device) -> None:
    x, length = captions(device) + mean, torch.tensor([3, 5], device=device)
    ours = text_padding(x, length, 7, POSITION.to(device), noise=1.0, impl="triton") - text_padding(
        x, length, 7, POSITION.to(device), noise=0.0
    )
    exact = [text_padding_reference(x.double(), length, 7, POSITION.to(device), noise=noise) for noise in (1.0, 0.0)]
    torch.testing.assert_close(ours.double(), exact[0] - exact[1], rtol=1e-4, atol=2 * 1e3 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.ones(2, 8)}, r"tokens must be \[B, M, E\], got \[2, 8\]"),
        ({"tokens": torch.ones(2, 8, 12, dtype=torch.int64)}, "tokens must be of a floating-point type"),
        ({"tokens": torch.ones(2, 8, 12, requires_grad=True)}, "detach tokens"),
        ({"length": torch.ones(3, dtype=torch.int64)}, r"length must be \[2\] int64, one number a caption, got \[3\]"),
        ({"length": torch.ones(2)}, "got .* torch.float32"),
        ({"position": torch.ones(3, dtype=torch.int64)}, r"position must be \[2\]"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {"tokens": captions(), "length": torch.tensor([3, 8]), "seed": 7, "position": POSITION}
    with pytest.raises(ValueError, match=message):
        text_padding(**{**arguments, **change})


@pytest.mark.usefixtures("kernels")
def test_what_the_kernels_cannot_hold_is_refused(device: torch.device) -> None:
    x = torch.ones(2, MAX_PLACES + 1, 1, device=device)
    with pytest.raises(ValueError, match=f"takes {MAX_PLACES} places"):
        text_padding(x, torch.tensor([3, 8], device=device), 7, POSITION.to(device), impl="triton")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_no_width_asks_for_a_grid_that_cuda_does_not_have() -> None:
    """The most elements that are taken, in one place and memory that is never touched: only x may be large."""
    from tests.kernels.interpreter import recording, run_program

    width = MAX_SIZE - 1000
    x, length = torch.empty(2, 1, width, dtype=torch.float16), torch.tensor([1, 1])
    x[1, 0, -4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with recording() as launches:
        y = text_padding(x, length, 7, POSITION, impl="triton")
    assert len(launches) == 2 and all(len(launch.grid) == 1 and 2**16 < launch.grid[0] < 2**31 for launch in launches)
    for launch in launches:
        run_program(launch, (launch.grid[0] - 1,))
    assert y[1, 0, -4:].tolist() == [1, 2, 3, 4]
