"""The line between two sets of weights: exact at its ends, and what stands between them is found."""

import math

import pytest
import torch

from fasttrain.research.interpolation import Profile, between, places


def test_the_ends_are_exact_and_the_middle_is_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = ({"w": torch.randn(50, generator=generator) * 1e3, "b": torch.randn(3, generator=generator)} for _ in range(2))
    for name in first:
        assert torch.equal(between(first, second, 0.0)[name], first[name])
        assert torch.equal(between(first, second, 1.0)[name], second[name])
        torch.testing.assert_close(between(first, second, 0.5)[name], (first[name] + second[name]) / 2)
        torch.testing.assert_close(between(first, second, -0.25)[name], 1.25 * first[name] - 0.25 * second[name])


@pytest.mark.parametrize("second", [{"w": torch.zeros(3)}, {"w": torch.zeros(2), "b": torch.zeros(1)}, {"v": torch.zeros(2)}])
def test_weights_of_another_network_are_no_end(second: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="same parameters"):
        between({"w": torch.zeros(2)}, second, 0.5)


@pytest.mark.parametrize("points", [2, 5, 21, 22])
def test_places_hold_both_ends_and_go_a_quarter_beyond(points: int) -> None:
    at = places(points)
    assert at.count(0.0) == at.count(1.0) == 1 and at == sorted(at)
    assert sum(0 <= a <= 1 for a in at) == points and at[0] >= -0.25 and at[-1] <= 1.25
    assert at[0] < -0.2 or points < 6


def test_one_point_is_no_line() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        places(1)


def test_a_parabola_has_no_barrier_and_a_hill_its_height() -> None:
    at = places(41)
    bowl = Profile(at, [(a - 0.75) ** 2 for a in at])
    assert bowl.barrier == 0 and bowl.lowest == 0.75 and bowl.ends == (0.5625, 0.0625)
    hill = Profile(at, [2 * a + math.sin(math.pi * a) for a in at])
    assert hill.barrier == pytest.approx(1.0) and hill.lowest == -0.25


def test_a_loss_that_is_no_number_between_the_ends_is_an_infinite_barrier() -> None:
    at = places(5)
    assert Profile(at, [math.nan if a == 0.5 else a for a in at]).barrier == math.inf
    beyond = Profile(at, [math.inf if a > 1 else 1 - a for a in at])
    assert beyond.barrier == 0 and beyond.lowest == 1.0
