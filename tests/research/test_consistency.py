"""PSNR against numbers computed by hand, and a control that knows classes from noise."""

import math

import numpy as np
import pytest

from fasttrain.research.consistency import MOST_DB, compared, matrix, psnr


def images(count: int, seed: int, scale: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, scale, (count, 4, 4, 1), dtype=np.uint8)


def test_psnr_is_that_of_the_formula() -> None:
    """An error of 51 levels, a fifth of the range, everywhere: 10 log10(25); in one pixel of 16: 10 log10(16 x 25)."""
    zeros = np.zeros((2, 4, 4, 1), np.uint8)
    other = zeros.copy()
    other[0] = 51
    other[1, 0, 0] = 51
    assert psnr(zeros, other) == pytest.approx([10 * math.log10(25), 10 * math.log10(400)])


def test_the_same_images_reach_what_8_bits_can_tell_and_no_more() -> None:
    same = images(3, 0)
    assert psnr(same, same) == pytest.approx([58.92] * 3, abs=0.01)
    nearly = same.copy()
    nearly[0, 0, 0, 0] ^= 1  # one level in one pixel of 16: 60.2 dB by the formula, less than rounding's error
    assert psnr(same, nearly)[0] == MOST_DB


def test_images_of_other_shapes_are_no_pair() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr(images(2, 0), images(3, 0))


def test_the_control_keeps_the_conditions_and_takes_other_noise() -> None:
    """Two classes by turns, each a picture of its own plus little noise; the second model has the noise of the first."""
    base = np.stack([np.full((4, 4, 1), 40, np.uint8), np.full((4, 4, 1), 200, np.uint8)])[np.arange(40) % 2]
    first = base + images(40, 1, scale=32)
    second = first + images(40, 2, scale=2)
    found = compared(first, second, period=2)
    assert found.same.value > 48 and 24 < found.control.value < 29  # another class would be 4 dB
    assert found.gain.value == pytest.approx(found.same.value - found.control.value)
    assert found.same.error == pytest.approx(psnr(first, second).std(ddof=1) / math.sqrt(40))


@pytest.mark.parametrize("period", [0, 3, 4])
def test_a_period_that_leaves_no_control_is_refused(period: int) -> None:
    with pytest.raises(ValueError, match="period"):
        compared(images(4, 0), images(4, 1), period)


def test_the_matrix_holds_each_pair_once_and_a_models_own_variety() -> None:
    models = [images(4, seed) for seed in range(3)]
    found = matrix(models, 1)
    assert all(found[i][j] == found[j][i] for i in range(3) for j in range(3))
    assert found[0][2] == compared(models[0], models[2], 1)
    assert found[1][1].same.value == MOST_DB and found[1][1].control.value < 15
