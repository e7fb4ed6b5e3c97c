"""Crops in training: where they lie, and that they are averaged exactly, whatever the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain_kernels.philox import Purpose, philox

from fasttrain.data.config import DataConfig
from fasttrain.data.crops import Crops, boxes, crops_of
from fasttrain.data.index import read_index
from fasttrain.errors import UserError
from tests.shards import write_random

POSITIONS = np.arange(4000)


def test_boxes_lie_inside_and_have_the_areas_asked_for():
    side, top, left = boxes(3, POSITIONS, 300, 200, (0.4, 0.6)).T
    assert top.min() == 0 and (300 - side - top).min() == 0 and left.min() == 0 and (200 - side - left).min() == 0
    area = (side / 200) ** 2
    # Areas are uniform, but for sides being whole pixels: one of 200 is at most 0.004 of an area here. 4 standard errors of 4000 draws.
    assert abs(area.min() - 0.4) < 0.005 and abs(area.max() - 0.6) < 0.005
    assert abs(area.mean() - 0.5) < 4 * (0.2 / 12**0.5) / 4000**0.5 + 0.004
    room = top / (300 - side)
    assert abs(room.mean() - 0.5) < 4 * (1 / 12**0.5) / 4000**0.5
    assert abs(np.corrcoef(room, left / (200 - side))[0, 1]) < 4 / 4000**0.5


def test_a_box_is_a_function_of_seed_and_position():
    some = np.array([7, 2**40, 11])
    again = np.stack([boxes(3, np.array([n]), 64, 64, (0.2, 1.0))[0] for n in some])
    np.testing.assert_array_equal(boxes(3, some, 64, 64, (0.2, 1.0)), again)
    assert (boxes(4, POSITIONS, 64, 64, (0.2, 1.0)) != boxes(3, POSITIONS, 64, 64, (0.2, 1.0))).any()


def test_the_whole_square_is_scale_one():
    np.testing.assert_array_equal(boxes(3, POSITIONS[:9], 64, 64, (1.0, 1.0)), [[64, 0, 0]] * 9)


def _images(number: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _averaged(image: np.ndarray, side: int, top: int, left: int, size: int) -> np.ndarray:
    """The crop with every pixel written size x size times, and averaged over side x side of these."""
    fine = image[:, top : top + side, left : left + side].repeat(size, 1).repeat(size, 2).astype(np.int64)
    return fine.reshape(3, size, side, size, side).sum((2, 4)) / side**2


@pytest.mark.parametrize(
    ("stored", "size", "scale"), [(20, 7, (0.2, 0.9)), (32, 8, (1.0, 1.0)), (16, 16, (1.0, 1.0)), (33, 12, (0.2, 0.3))]
)
def test_a_crop_is_averaged_over_areas(stored: int, size: int, scale: tuple[float, float]):
    crops, images = Crops(5, stored, size, scale), _images(16, stored)
    box = crops.boxes(POSITIONS[:16])
    cut = crops.cut(images, torch.from_numpy(box))
    assert cut.dtype == torch.float32 and cut.shape == (16, 3, size, size)
    for image, row, found in zip(images.numpy(), box.tolist(), cut.numpy(), strict=True):
        np.testing.assert_array_equal(found, _averaged(image, *row, size).astype(np.float32))


def test_a_square_of_the_models_own_size_is_kept_as_it_is():
    images = _images(4, 9)
    assert torch.equal(Crops(0, 9, 9, (1.0, 1.0)).cut(images, torch.tensor([[9, 0, 0]] * 4)), images.float())


def test_bits_do_not_depend_on_the_batch():
    crops, images = Crops(5, 40, 17, (0.3, 1.0)), _images(64, 40)
    box = torch.from_numpy(crops.boxes(POSITIONS[:64]))
    whole = crops.cut(images, box)
    for rows in (slice(0, 1), slice(5, 8), slice(13, 64)):
        assert torch.equal(whole[rows], crops.cut(images[rows], box[rows]))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    shapes = {"image": (3, 16, 16), "latent": (2, 2, 4, 8, 8)}
    return {kind: str(write_random(folder / kind, kind, shape, classes=2)) for kind, shape in shapes.items()}


def _crops(sets: dict[str, str], kind: str, **settings: object) -> Crops | None:
    return crops_of(DataConfig(train=sets[kind], **settings), read_index(Path(sets[kind])), 3)


def test_what_a_config_means(sets: dict[str, str]):
    assert _crops(sets, "image") is None and _crops(sets, "image", size=16) is None and _crops(sets, "latent") is None
    assert _crops(sets, "image", size=8) == Crops(3, 16, 8, (1.0, 1.0))
    assert _crops(sets, "image", size=8, crop_scale=(0.4, 0.6)) == Crops(3, 16, 8, (0.4, 0.6))


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("latent", {"crop_scale": (0.4, 0.6)}, r"data\.crop_scale: .* holds latents.*--crop random --crop-scale"),
        ("latent", {"size": 8}, r"data\.size: .* holds latents.*prepare them with --size"),
        ("image", {"crop_scale": (0.4, 0.6)}, r"data\.crop_scale needs data\.size"),
        ("image", {"size": 17}, r"data\.size 17: .* gives images of 16 pixels and nothing is enlarged"),
        ("image", {"size": 12, "crop_scale": (0.4, 0.6)}, r"data\.size 12: .* gives crops from 10 pixels on, of images of 16,"),
    ],
)
def test_what_cannot_be_cropped_so_is_refused(sets: dict[str, str], kind: str, settings: dict, told: str):
    with pytest.raises(UserError, match=told):
        _crops(sets, kind, **settings)


@pytest.mark.parametrize("scale", [(0.6, 0.4), (0, 0.5), (0.5, 1.1), (0.5,)])
def test_a_scale_is_two_shares(scale: tuple[float, ...]):
    with pytest.raises(ValueError, match="crop_scale"):
        DataConfig(train="x", crop_scale=scale)


def test_a_box_is_what_the_formula_says():
    side, top, left = boxes(3, POSITIONS, 300, 200, (0.2, 1.0)).T
    u0, u1, u2, _ = (integers.numpy() / 2**32 for integers in philox(3, 0, Purpose.CROP, torch.from_numpy(POSITIONS)))
    np.testing.assert_array_equal(side, np.rint(200 * np.sqrt(0.2 + 0.8 * u0)))
    np.testing.assert_array_equal(top, np.floor(u1 * (300 - side + 1)))
    np.testing.assert_array_equal(left, np.floor(u2 * (200 - side + 1)))
