"""Timestep draws: pure, of their distribution, and for the stratified sequence more even than chance."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.timesteps import TIMESTEPS, drawn_on
from tests.diffusion.tables import DRAWS

SEED = torch.tensor(1234)
MASK = 2**64 - 1


def discrepancy(u: Tensor) -> float:
    """Star discrepancy in one dimension: the largest gap between the empirical and the uniform distribution."""
    u, n = u.sort().values, len(u)
    rank = torch.arange(n, dtype=torch.float64)
    return torch.maximum((rank + 1) / n - u, u - rank / n).max().item()


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_depends_on_seed_and_position_only(name: str) -> None:
    draw = drawn_on(TIMESTEPS.build(DRAWS[name]), SCHEDULES.build("flow")).draw
    position = torch.tensor([5, 1017, 2**31 + 3, 2**40, 17])
    whole = draw(SEED, position)
    assert torch.equal(whole, torch.cat([draw(SEED, position[i : i + 1]) for i in range(5)]))
    assert torch.equal(whole.flip(0), draw(SEED, position.flip(0)))
    assert not torch.equal(whole, draw(SEED + 1, position))


@pytest.mark.parametrize("name", ["uniform", "stratified"])
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
    evenness = {name: sum(discrepancy(TIMESTEPS.build(name).draw(SEED, p)) for p in position) / 100 for name in ("uniform", "stratified")}
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


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logits_are_normal(mean: float, std: float, stratified: bool) -> None:
    n = 40_000
    made = TIMESTEPS.build({"name": "logit_normal", "mean": mean, "std": std, "stratified": stratified})
    u = made.draw(SEED, torch.arange(n))
    assert u.dtype == torch.float64 and (u > 0).all() and (u < 1).all()
    as_uniform = torch.special.ndtr((torch.logit(u) - mean) / std)
    assert discrepancy(as_uniform) < (0.001 if stratified else 1.63 / n**0.5)


def test_logit_normal_against_the_standard_library() -> None:
    position = torch.arange(50)
    p = TIMESTEPS.build("uniform").draw(SEED, position)
    expected = [1 / (1 + math.exp(-(0.3 + 0.8 * NormalDist().inv_cdf(value)))) for value in p.tolist()]
    got = TIMESTEPS.build({"name": "logit_normal", "mean": 0.3, "std": 0.8}).draw(SEED, position)
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_half_of_stable_diffusion_3_s_draws_lie_in_the_middle_third() -> None:
    """rf/lognorm(0, 1): 1/3 < t < 2/3 is |logit| < ln 2, which a standard normal has with probability 2 Phi(0.6931) - 1 = 0.5118."""
    u = TIMESTEPS.build({"name": "logit_normal", "stratified": True}).draw(SEED, torch.arange(10_000))
    assert ((u > 1 / 3) & (u < 2 / 3)).double().mean().item() == pytest.approx(0.5118, abs=1e-3)


def test_a_draw_never_reaches_1() -> None:
    made = TIMESTEPS.build({"name": "logit_normal", "mean": 20.0, "std": 20.0})
    assert made.draw(SEED, torch.arange(10_000)).max() == 1 - 2.0**-53


@pytest.mark.parametrize("params", [{"std": 0}, {"std": -1}, {"std": math.nan}, {"mean": math.inf}, {"mean": 21}])
def test_impossible_logit_normals_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        TIMESTEPS.build({"name": "logit_normal", **params})
