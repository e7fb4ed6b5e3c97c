"""Losses of ranges over training, and between two networks."""

import pytest
import torch

from fasttrain.research.ranges import averaged, change, told_apart


def test_averages_of_successive_reports() -> None:
    points = [(10.0, 4.0), (20.0, 2.0), (30.0, 1.0), (40.0, 3.0), (50.0, 5.0)]
    assert averaged(points, 1).points == points
    assert averaged(points, 2).points == [(15.0, 3.0), (35.0, 2.0), (50.0, 5.0)]
    assert averaged([], 3).points == []


def test_change_is_told_from_pairs_of_the_same_sample() -> None:
    """Losses vary a lot from sample to sample; the change of each is small and the same: pairs see it."""
    before = torch.rand(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    wobble = 0.01 * torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    after = before + wobble + torch.tensor([[-0.05], [0.0]])
    found = change(before, after)
    assert float(found.share[0]) == pytest.approx(-0.05 / float(before[0].mean()), rel=0.05)
    assert float(found.error[0]) == pytest.approx(0.01 / 20 / float(before[0].mean()), rel=0.1)
    assert told_apart(found).tolist() == [-1, 0]
