"""The Frechet distance against closed forms and scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fasttrain.evaluation.frechet import Gaussian, Moments, frechet_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: Tensor, cov: Tensor) -> Gaussian:
    return Gaussian(mean, cov, 1000)


def moments_of(rows: Tensor, batch: int) -> Gaussian:
    moments = Moments(rows.shape[1])
    for part in rows.split(batch):
        moments.update(part)
    return moments.gaussian()


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_streamed_moments_equal_those_of_the_whole(batch: int) -> None:
    # A mean a million deviations off: a sum of squares would lose every digit.
    rows = normal(500, 6) + 1e6
    got = moments_of(rows, batch)
    assert got.vectors == 500
    torch.testing.assert_close(got.mean, rows.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(got.cov, torch.from_numpy(np.cov(rows.numpy().T)), rtol=0, atol=1e-9)


def test_an_empty_batch_adds_nothing_and_one_image_has_no_covariance() -> None:
    moments = Moments(3)
    moments.update(normal(0, 3))
    moments.update(normal(1, 3))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.gaussian()


@pytest.mark.parametrize("rank", [3, 40])
def test_a_set_is_at_no_distance_from_itself(rank: int) -> None:
    cov = normal(40, rank) @ normal(40, rank).T
    one = gaussian(normal(40), cov)
    assert frechet_distance(one, one) < 1e-12 * cov.trace().item()


def test_independent_features_have_a_closed_form() -> None:
    """|mu_1 - mu_2|^2 + sum_i (s_i - r_i)^2."""
    s, r = normal(12, seed=1).abs(), normal(12, seed=2).abs()
    r[3], s[5] = 0, 0
    one, other = gaussian(normal(12, seed=3), torch.diag(s**2)), gaussian(normal(12, seed=4), torch.diag(r**2))
    expected = (one.mean - other.mean).square().sum() + (s - r).square().sum()
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-13)


def test_rotation_changes_nothing() -> None:
    s, r = normal(12, seed=1).abs(), normal(12, seed=2).abs()
    turn, _ = torch.linalg.qr(normal(12, 12, seed=5))
    zero = torch.zeros(12, dtype=torch.float64)
    turned = [gaussian(zero, turn @ torch.diag(d**2) @ turn.T) for d in (s, r)]
    assert frechet_distance(*turned) == pytest.approx((s - r).square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scipy(seed: int) -> None:
    a, b = normal(30, 90, seed=seed), normal(30, 90, seed=seed + 50)
    one, other = gaussian(normal(30, seed=seed + 100), a @ a.T / 90), gaussian(normal(30, seed=seed + 150), b @ b.T / 90)
    root = np.trace(scipy.linalg.sqrtm((one.cov @ other.cov).numpy())).real
    expected = (one.mean - other.mean).square().sum() + one.cov.trace() + other.cov.trace() - 2 * root
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-11)


def test_fewer_images_than_features() -> None:
    """Both covariances of rank 19 in 64 dimensions; the smaller product of data matrices gives the same trace."""
    a, b = normal(20, 64, seed=1), normal(20, 64, seed=2)
    one, other = moments_of(a, 8), moments_of(b, 8)
    between = (a - a.mean(0)) @ (b - b.mean(0)).T / 19
    expected = (one.mean - other.mean).square().sum() + one.cov.trace() + other.cov.trace() - 2 * torch.linalg.matrix_norm(between, "nuc")
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-12)


def test_constant_features_are_fine() -> None:
    zero = torch.zeros(5, dtype=torch.float64)
    flat, spread = gaussian(zero, torch.zeros(5, 5, dtype=torch.float64)), gaussian(zero + 1, torch.eye(5, dtype=torch.float64))
    assert frechet_distance(flat, spread) == pytest.approx(10, rel=1e-14)


def test_features_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths: 3 and 4"):
        frechet_distance(moments_of(normal(9, 3), 9), moments_of(normal(9, 4), 9))
