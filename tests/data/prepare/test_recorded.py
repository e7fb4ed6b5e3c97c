"""What preparing records of each image: its own size upright, and the crop that was taken, in every kind of set."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.data.config import DataConfig
from fasttrain.data.facts import RECORDED
from fasttrain.data.order import permutation
from fasttrain.data.prepare import images
from fasttrain.data.prepare.images import prepare_images
from fasttrain.data.prepare.latents import prepare_latents
from fasttrain.data.prepare.pixels import Crop, centre_crop, centre_facts, read_square, square_of
from fasttrain.data.shards import ShardSet
from fasttrain.data.vae import Vae
from fasttrain.errors import UserError
from tests.labelled_images import write_tar

from ..conftest import contents
from .test_pixels import encoded

RNG = np.random.default_rng(0)
SIDEWAYS = 6  # the EXIF orientation of a camera held upright


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def facts_of(folder: Path) -> np.ndarray:
    columns = ShardSet.open(folder).facts(RECORDED)
    return np.stack([columns[name] for name in RECORDED], axis=-1)


def sizes_in_order(tree: Path) -> list[tuple[int, int]]:
    """(width, height) of the readable files of a tree, in the order of a set's samples."""
    files = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.*"))
    shuffled = [files[i] for i in permutation(len(files), 0)]
    return [Image.open(tree / file).size for file in shuffled if not file.endswith(("notes.txt", "void.jpg"))]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (65, 40), (40, 67), (129, 200), (31, 500), (16, 17), (500, 375)])
def test_the_facts_are_where_the_crop_was_taken(width: int, height: int):
    """The square is found again at the place told, in the image resized as it was."""
    image = noise(width, height)
    high, wide, top, left, share = centre_facts(width, height, 32)
    assert (high, wide, share) == (height, width, 1)
    resized = image
    while min(resized.size) >= 64:
        resized = resized.resize((resized.width // 2, resized.height // 2), Image.Resampling.BOX)
    scale = 32 / min(resized.size)
    resized = resized.resize((round(resized.width * scale), round(resized.height * scale)), Image.Resampling.BICUBIC)
    found = resized.crop((left, top, left + 32, top + 32))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(centre_crop(image, 32)))
    # Centred: as much is cut off on either side, but for the one odd pixel.
    assert abs(resized.width - 32 - 2 * left) <= 1 and abs(resized.height - 32 - 2 * top) <= 1


def test_images_lying_on_their_side_are_measured_upright():
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    assert read_square(encoded(noise(60, 40), exif=exif), 16).facts[:2] == (60, 40)
    assert read_square(encoded(noise(60, 40)), 16).facts[:2] == (40, 60)


def test_a_random_crop_is_the_square_that_its_facts_tell():
    image = noise(90, 60)
    for key in range(20):
        pixels, (height, width, top, left, share) = square_of(image, 16, Crop((0.3, 0.8), key))
        side = round(share * 60)
        down, across = round(top * side / 16), round(left * side / 16)
        assert (height, width) == (60, 90) and side / 60 == share and 0 <= down <= 60 - side and 0 <= across <= 90 - side
        cut = image.crop((across, down, across + side, down + side))
        np.testing.assert_array_equal(pixels, np.asarray(centre_crop(cut, 16)).transpose(2, 0, 1))


@pytest.fixture(scope="module")
def prepared(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "set"
    prepare_images(image_tree, out, size=32, shard_size=50)
    return out


@pytest.fixture(scope="module")
def cropped(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cropped") / "set"
    prepare_images(image_tree, out, size=32, shard_size=50, crop_scale=(0.4, 0.6))
    return out


def test_images_have_their_own_facts(image_tree: Path, prepared: Path):
    index = ShardSet.open(prepared).index
    assert index.facts == RECORDED and index.pixels == 32
    expected = [centre_facts(width, height, 32) for width, height in sizes_in_order(image_tree)]
    np.testing.assert_array_equal(facts_of(prepared), np.array(expected, np.float32))


def test_digits_are_whole(prepared_digits: Path):
    index = ShardSet.open(prepared_digits).index
    assert index.pixels == 8
    np.testing.assert_array_equal(facts_of(prepared_digits), np.array([[8, 8, 0, 0, 1]] * 1797, np.float32))


def test_latents_record_what_their_images_do(image_tree: Path, vae_folder: Path, cropped: Path, tmp_path: Path):
    vae = Vae.load(str(vae_folder))
    prepare_latents(image_tree, tmp_path / "set", vae, size=32, shard_size=50, crop_scale=(0.4, 0.6))
    np.testing.assert_array_equal(facts_of(tmp_path / "set"), facts_of(cropped))
    index = ShardSet.open(tmp_path / "set").index
    assert index.pixels == 32 and index.x0_shape == (4, 16, 16)


def test_random_crops_have_areas_of_the_scale_and_lie_anywhere(image_tree: Path, cropped: Path):
    height, width, top, left, share = facts_of(cropped).T
    # A side is a whole pixel of at least 20: half of one is 5 % of an area at most.
    assert (share**2 > 0.4 * 0.95).all() and (share**2 < 0.6 * 1.05).all() and len(np.unique(share)) > 50
    side = share * np.minimum(height, width)
    assert (top * side / 32 <= height - side + 1e-3).all() and (left * side / 32 <= width - side + 1e-3).all()
    assert [tuple(each) for each in zip(width, height, strict=True)] == sizes_in_order(image_tree)


def test_a_random_crop_depends_on_its_file_alone(image_tree: Path, cropped: Path, tmp_path: Path):
    prepare_images(image_tree, tmp_path / "two", size=32, shard_size=50, workers=2, crop_scale=(0.4, 0.6))
    assert contents(tmp_path / "two") == contents(cropped)
    prepare_images(image_tree, tmp_path / "other", size=32, shard_size=20, crop_scale=(0.4, 0.6))
    assert (tmp_path / "other" / "facts.npy").read_bytes() == (cropped / "facts.npy").read_bytes()


def test_another_crop_in_the_folder(image_tree: Path, prepared: Path, cropped: Path):
    with pytest.raises(UserError, match=r"already holds a different set \(crop_scale \[0\.4, 0\.6\] there, \[0\.9, 1\.0\] asked for"):
        prepare_images(image_tree, cropped, size=32, shard_size=50, crop_scale=(0.9, 1.0))
    with pytest.raises(UserError, match=r"crop_scale None there, \[0\.9, 1\.0\] asked for"):
        prepare_images(image_tree, prepared, size=32, shard_size=50, crop_scale=(0.9, 1.0))


def _command(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    images.add_arguments(parser)
    images.run(parser.parse_args([*map(str, arguments), "--size", "32", "--shard-size", "50", "--workers", "1"]))


def test_the_command(image_tree: Path, cropped: Path, capsys: pytest.CaptureFixture[str]):
    _command(image_tree, cropped, "--crop", "random", "--crop-scale", 0.4, 0.6)
    assert "nothing left to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--crop-scale", 0.4, 0.6), "--crop-scale goes with --crop random"),
        (("--crop", "random", "--crop-scale", 0.6, 0.4), r"0 < LOW <= HIGH <= 1, got 0\.6 0\.4"),
        (("--crop", "random", "--crop-scale", 0, 0.4), "0 < LOW"),
        (("--crop", "random", "--crop-scale", "nan", 1), "0 < LOW"),
    ],
)
def test_scales_that_are_none(image_tree: Path, tmp_path: Path, arguments: tuple[object, ...], told: str):
    with pytest.raises(UserError, match=told):
        _command(image_tree, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_facts_are_verified_when_they_are_read(digits: Path):
    shards = ShardSet.open(digits)
    content = bytearray((digits / "facts.npy").read_bytes())
    content[200] ^= 1
    (digits / "facts.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"facts\.npy: its content is not what was prepared"):
        shards.facts(["height"])
    (digits / "facts.npy").unlink()
    with pytest.raises(UserError, match=r"facts\.npy: missing"):
        shards.facts(["height"])
    assert shards.facts([]) == {} and len(ShardSet.open(digits)) == 1797  # who needs none reads none


@pytest.mark.parametrize("changes", [{"facts": ["height"]}, {"facts": []}, {"facts_xxh3": None}, {"facts": ["a", "a", "b", "c", "d"]}])
def test_an_index_that_contradicts_its_facts_is_refused(digits: Path, changes: dict):
    index = json.loads((digits / "index.json").read_bytes())
    (digits / "index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(UserError, match=r"facts"):
        ShardSet.open(digits).facts(["height"])


def test_shards_made_elsewhere_have_the_facts_of_prepared_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    files = [
        ("jpg", encoded(noise(60, 40), "JPEG", exif=exif)),
        ("png", encoded(noise(33, 50))),
        ("png", encoded(noise(50, 33), exif=exif)),
        ("webp", encoded(noise(44, 90), "WEBP", exif=exif)),
    ]
    array = tmp_path / "a.npy"
    np.save(array, RNG.integers(0, 256, (3, 21, 43), np.uint8))
    expected = [read_square(content, 24).facts for _, content in files] + [centre_facts(43, 21, 24)]
    members = [(f"{number}.{ending}", content) for number, (ending, content) in enumerate([*files, ("npy", array.read_bytes())])]
    write_tar(tmp_path / "set.tar", [*members, ("9.png", b"no image")])
    shards = ShardSet.open(tmp_path / "set.tar", DataConfig(train="x", size=24, max_damaged=1))
    assert shards.index.facts == RECORDED and shards.index.pixels == 24
    found = np.stack(list(shards.facts(RECORDED).values()), axis=-1)
    np.testing.assert_array_equal(found, np.array([*expected, (0, 0, 0, 0, 0)], np.float32))
    assert shards.gather(np.arange(6)).readable.tolist() == [True] * 5 + [False]
