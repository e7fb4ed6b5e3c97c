"""Samples as files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.sampling.images import GROUND, npz_stream, save_grid, save_pngs, tile, to_uint8


def digits(count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_to_uint8_inverts_the_data_s_scaling(channels: int) -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, channels, 16, 16)
    assert np.array_equal(to_uint8(stored.float() / 127.5 - 1), stored.permute(0, 2, 3, 1).numpy())


def test_to_uint8_clips() -> None:
    x0 = torch.tensor([-7.0, -1.0, 0.9999, 1.0, 7.0]).reshape(1, 1, 1, 5)
    assert to_uint8(x0).ravel().tolist() == [0, 0, 255, 255, 255]


def test_latents_are_not_images() -> None:
    with pytest.raises(ValueError, match="1 or 3 channels"):
        to_uint8(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_tile_places_enlarges_and_separates(channels: int) -> None:
    images = digits(5, channels)
    picture = tile(images, columns=3, min_side=16)
    assert picture.shape == (2 * 20 + 4, 3 * 20 + 4, channels)
    for i in range(5):
        row, column = divmod(i, 3)
        block = picture[row * 20 + 4 : row * 20 + 20, column * 20 + 4 : column * 20 + 20]
        assert np.array_equal(block, images[i].repeat(2, axis=0).repeat(2, axis=1))
        block[:] = GROUND
    assert (picture == GROUND).all()


def test_large_images_are_not_enlarged() -> None:
    assert tile(np.zeros((4, 80, 64, 3), np.uint8)).shape == (2 * 84 + 4, 2 * 68 + 4, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_read_back(tmp_path: Path, channels: int) -> None:
    images = digits(3, channels)
    save_grid(tmp_path / "made" / "grid.png", images)
    save_pngs(tmp_path / "png", [4, 5, 6], images)
    with npz_stream(tmp_path / "samples.npz", 3) as add:
        add(images[:2], np.array([1, 2]))
        add(images[2:], np.array([0]))
    grid = np.asarray(Image.open(tmp_path / "made" / "grid.png")).reshape(140, 140, channels)
    assert np.array_equal(grid, tile(images))
    single = np.asarray(Image.open(tmp_path / "png" / "000005.png")).reshape(8, 8, channels)
    assert np.array_equal(single, images[1])
    with np.load(tmp_path / "samples.npz") as stored:
        assert np.array_equal(stored["arr_0"], images) and stored["arr_0"].dtype == np.uint8
        assert stored["labels"].tolist() == [1, 2, 0]
    with npz_stream(tmp_path / "unlabelled.npz", 3) as add:
        add(images, None)
    with np.load(tmp_path / "unlabelled.npz") as stored:
        assert stored.files == ["arr_0"] and np.array_equal(stored["arr_0"], images)
    assert not list(tmp_path.rglob("*.tmp"))
