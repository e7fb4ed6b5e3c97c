"""Gradients by range: against autograd on everything at once, in any number of blocks; and what is signal in them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fasttrain.research.gradients import RangeGradients, blocks, range_gradients

RANGES, BATCHES = 3, 2


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2), nn.Linear(3, 3))  # the last one is never used


def inputs(number: int, half: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * number + half)
    return [torch.randn(5, 4, generator=generator) + number for _ in range(BATCHES)]


def losses_of(model: nn.Module):
    def losses(number: int, half: int) -> Iterator[Tensor]:
        return (model[:3](batch).square().mean() for batch in inputs(number, half))

    return losses


def direct(model: nn.Module) -> Tensor:
    """All gradients [2, K, P] in one go."""
    rows = []
    for half in range(2):
        for number in range(RANGES):
            model.zero_grad()
            torch.stack(list(losses_of(model)(number, half))).mean().backward()
            rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]))
    return torch.stack(rows).double().view(2, RANGES, -1)


@pytest.mark.parametrize("room", [1 << 20, 2 * RANGES * 4 * 30, 1])
def test_products_are_those_of_whole_gradients_however_little_room_there_is(room: int) -> None:
    model = network()
    found = range_gradients(list(model.parameters()), losses_of(model), RANGES, room=room)
    whole = direct(model)
    mean = whole.mean(0)
    torch.testing.assert_close(found.gram, mean @ mean.T, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.products, torch.einsum("hip,gjp->higj", whole, whole), rtol=1e-5, atol=1e-9)
    expected = [[torch.stack(list(losses_of(model)(k, h))).mean().item() for k in range(RANGES)] for h in range(2)]
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64))


def test_blocks_hold_every_parameter_once_and_no_more_than_they_may() -> None:
    parameters = [torch.zeros(n) for n in (3, 4, 10, 1, 1, 6)]
    found = blocks(parameters, 8)
    assert [[p.numel() for p in block] for block in found] == [[3, 4], [10], [1, 1, 6]]


def estimate(signal: Tensor, noise: float, seed: int) -> RangeGradients:
    """Gradients [K, P] seen through independent noise of this length in each half."""
    generator = torch.Generator().manual_seed(seed)
    k, p = signal.shape
    halves = signal + noise * torch.randn(2, k, p, dtype=torch.float64, generator=generator) / p**0.5
    return RangeGradients(torch.einsum("hip,gjp->higj", halves, halves), torch.zeros(2, k))


def test_without_noise_halves_agree_and_both_matrices_are_the_cosines() -> None:
    signal = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    found = estimate(signal, 0.0, 0)
    root = 2**-0.5
    expected = torch.tensor([[1, 0, -root], [0, 1, -root], [-root, -root, 1]], dtype=torch.float64)
    torch.testing.assert_close(found.cosines, expected)
    torch.testing.assert_close(found.signal_cosines, expected)
    torch.testing.assert_close(found.half_cosines, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found.noise_shares, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_noise_hides_a_conflict_and_the_halves_bring_it_back() -> None:
    """Unit gradients of cosine -0.8; each half's noise is twice as long: a mean of halves has |g|^2 = 1 + 4 / 2."""
    signal = torch.zeros(2, 4000, dtype=torch.float64)
    signal[0, 0], signal[1, 0], signal[1, 1] = 1.0, -0.8, 0.6
    found = [estimate(signal, 2.0, seed) for seed in range(8)]
    raw = sum(float(f.cosines[0, 1]) for f in found) / 8
    mended = sum(float(f.signal_cosines[0, 1]) for f in found) / 8
    assert raw == pytest.approx(-0.8 / 3, abs=0.03) and mended == pytest.approx(-0.8, abs=0.1)
    assert sum(float(f.noise_shares.mean()) for f in found) / 8 == pytest.approx(2 / 3, abs=0.03)


def test_what_noise_hides_wholly_is_not_made_up() -> None:
    products = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    for h in range(2):
        products[h, 0, h, 0] = products[h, 1, h, 1] = 1.0
    products[0, 0, 1, 0] = products[1, 0, 0, 0] = -0.1  # the first range's halves point apart
    products[0, 1, 1, 1] = products[1, 1, 0, 1] = 0.9
    found = RangeGradients(products, torch.zeros(2, 2)).signal_cosines
    assert found.isnan().tolist() == [[True, True], [True, False]]


def test_a_range_without_gradient_conflicts_with_none() -> None:
    found = estimate(torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64), 0.0, 0)
    assert found.cosines[0].tolist() == [0.0, 0.0] and found.half_cosines[0] == 0 and found.noise_shares[0] == 0
