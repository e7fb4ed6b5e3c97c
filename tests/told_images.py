"""A small set whose samples differ in everything that a model can be told: class, caption, size, crop and shape."""

from pathlib import Path

import numpy as np
from PIL import Image

from fasttrain.data.prepare.captions import Wanted
from fasttrain.data.prepare.images import prepare_images
from fasttrain.data.prepare.text import prepare_text
from fasttrain.data.text.encoder import TextEncoder
from tests.data.text.tiny_encoder import write_tiny_encoder

SAMPLES, SIDE = 60, 16
PLACES, WIDTH, POOLED = 32, 32, 24


def write_tree(root: Path) -> Path:
    """Two class folders of photographs of noise between 20 and 90 pixels, each with a caption of its own beside it."""
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        folder = root / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(20, 90, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a photo of {number}")
    return root


def write_told(folder: Path) -> Path:
    """The tree as a set of `SIDE` pixels in shards of ten, random crops, and its text inside it by a tiny encoder."""
    tree, out = write_tree(folder / "tree"), folder / "set"
    prepare_images(tree, out, SIDE, shard_size=10, crop_scale=(0.4, 0.9), wanted=Wanted("txt"))
    encoder = TextEncoder.load(str(write_tiny_encoder(folder / "encoder", hidden=WIDTH, projection=POOLED, places=PLACES)))
    prepare_text(str(out), out / "text", encoder, part_size=20)
    return out
