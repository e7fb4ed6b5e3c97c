"""Timestep draws: pure, uniform, and for the stratified sequence more even than chance."""

import pytest
import torch
from torch import Tensor

from fasttrain.diffusion.timesteps import TIMESTEPS

SEED = torch.tensor(1234)
MASK = 2**64 - 1


def discrepancy(u: Tensor) -> float:
    """Star discrepancy in one dimension: the largest gap between the empirical and the uniform distribution."""
    u, n = u.sort().values, len(u)
    rank = torch.arange(n, dtype=torch.float64)
    return torch.maximum((rank + 1) / n - u, u - rank / n).max().item()


@pytest.mark.parametrize("name", TIMESTEPS.names())
def test_a_draw_depends_on_seed_and_position_only(name: str) -> None:
    draw = TIMESTEPS.build(name).draw
    position = torch.tensor([5, 0, 2**31 + 3, 2**40, 17])
    whole = draw(SEED, position)
    assert torch.equal(whole, torch.cat([draw(SEED, position[i : i + 1]) for i in range(5)]))
    assert torch.equal(whole.flip(0), draw(SEED, position.flip(0)))
    assert not torch.equal(whole, draw(SEED + 1, position))


@pytest.mark.parametrize("name", TIMESTEPS.names())
@pytest.mark.parametrize("start", [0, 2**33])
def test_draws_are_uniform(name: str, start: int) -> None:
    n = 40_000
    u = TIMESTEPS.build(name).draw(SEED, torch.arange(start, start + n))
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    # Kolmogorov-Smirnov: a uniform sample passes 1.63 / sqrt(n) once in a hundred times; the seed is fixed.
    assert discrepancy(u) < 1.63 / n**0.5


def test_uniform_draws_are_independent_of_their_neighbours() -> None:
    u = TIMESTEPS.build("uniform").draw(SEED, torch.arange(40_000))
    assert torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].abs() < 4 / 40_000**0.5


@pytest.mark.parametrize("batch", [16, 64, 256])
def test_stratified_batches_are_more_even_than_chance(batch: int) -> None:
    position = torch.arange(batch * 100).reshape(100, batch)
    evenness = {name: sum(discrepancy(TIMESTEPS.build(name).draw(SEED, p)) for p in position) / 100 for name in TIMESTEPS.names()}
    assert evenness["stratified"] < evenness["uniform"] / 2


def test_any_256_successive_stratified_draws_fill_64_bins() -> None:
    for start in (0, 1001, 2**41):
        u = TIMESTEPS.build("stratified").draw(SEED, torch.arange(start, start + 256))
        counts = torch.bincount((u * 64).long(), minlength=64)
        assert counts.min() >= 3 and counts.max() <= 5


def test_stratified_advances_by_exactly_the_golden_step() -> None:
    position = [0, 1, 2, 10**6, 2**40 + 7]
    drawn = TIMESTEPS.build("stratified").draw(SEED, torch.tensor(position))
    top_bits = [int(u * 2**53) for u in drawn.tolist()]
    for n, bits in zip(position, top_bits, strict=True):
        ahead = (n * 0x9E3779B97F4A7C15 & MASK) >> 11
        # The offset's own lower bits may carry one into the kept ones.
        assert (bits - top_bits[0] - ahead) % 2**53 in (0, 1)
