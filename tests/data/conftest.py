"""Sets of shards and sources of images that the data tests share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.data.prepare.digits import prepare_digits
from fasttrain.data.prepare.text import prepare_text
from fasttrain.data.text.encoder import TextEncoder
from tests.data.text.tiny_encoder import write_tiny_encoder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def prepared_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "set"
    prepare_digits(out)
    return out


@pytest.fixture
def digits(prepared_digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits, to be damaged."""
    return Path(shutil.copytree(prepared_digits, tmp_path / "digits"))


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 small photographs of noise in three class folders, of many sizes, and two files that are none."""
    root = tmp_path_factory.mktemp("source") / "photos"
    rng = np.random.default_rng(0)
    for number in range(203):
        folder = root / ("cat", "dog", "owl")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(20, 90, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "owl" / "void.jpg").touch()
    return root


@pytest.fixture
def small_tree(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a tree of two classes with a few PNGs each."""

    def make(each: int) -> Path:
        rng = np.random.default_rng(1)
        for name in ("a", "b"):
            (tmp_path / "tree" / name).mkdir(parents=True)
            for number in range(each):
                pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "tree" / name / f"{number}.png")
        return tmp_path / "tree"

    return make


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small AutoencoderKL with random weights: 2 pixels a latent, 4 channels."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'fasttrain[latents]'")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    folder = tmp_path_factory.mktemp("vae") / "tiny-vae"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text encoder with a projection: 32 places, tokens of 32, pooled 24."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fasttrain[text]'")
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny-clip")


@pytest.fixture(scope="session")
def encoder(encoder_folder: Path) -> TextEncoder:
    return TextEncoder.load(str(encoder_folder))


@pytest.fixture(scope="session")
def prepared_text(prepared_digits: Path, encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' text in four parts: eleven captions, three in a part."""
    out = tmp_path_factory.mktemp("text") / "text"
    prepare_text(str(prepared_digits), out, encoder, "the digit {}", part_size=3, batch=2)
    return out
