"""Samples as files: PNGs, a grid, and the `.npz` that ADM's evaluation reads. Every file appears whole or not at all."""

import io
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fasttrain.files import whole, write_whole

Images = NDArray[np.uint8]  # [n, H, W, C], C = 1 (grey) or 3 (RGB)

# Between the tiles of a grid, in pixels and as a grey: dark or bright images would run into one another without it.
GAP, GROUND = 4, 96


def to_uint8(x0: Tensor) -> Images:
    """Pixels in [-1, 1] as bytes: round((x + 1) 127.5), clipped to [0, 255]; the inverse of x = byte / 127.5 - 1.

    Args:
        x0: [n, C, H, W], any float dtype; C is 1 or 3.

    Returns:
        [n, H, W, C] uint8, on the host.

    Raises:
        ValueError: another number of channels (latents must be decoded first).
    """
    if x0.dim() != 4 or x0.shape[1] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, [n, C, H, W]; got {tuple(x0.shape)}")
    pixels = ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def tile(images: Images, columns: int | None = None, min_side: int = 64) -> Images:
    """One picture of all images in rows, each enlarged until it measures at least `min_side`, on a grey ground.

    Args:
        images: [n, H, W, C] uint8.
        columns: tiles in a row; by default as square as possible.
        min_side: in pixels; nearest-neighbour enlargement, so that 8 x 8 digits can be seen.

    Returns:
        [H', W', C] uint8.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    enlarge = math.ceil(min_side / min(height, width))
    down, across = height * enlarge + GAP, width * enlarge + GAP
    picture = np.full((rows * down + GAP, columns * across + GAP, channels), GROUND, np.uint8)
    for i, image in enumerate(images.repeat(enlarge, axis=1).repeat(enlarge, axis=2)):
        top, left = i // columns * down + GAP, i % columns * across + GAP
        picture[top : top + height * enlarge, left : left + width * enlarge] = image
    return picture


def save_grid(path: Path, images: Images, columns: int | None = None, min_side: int = 64) -> None:
    """Writes `tile(images)` as a PNG."""
    write_whole(path, _png(tile(images, columns, min_side)))


def save_pngs(folder: Path, numbers: Iterable[int], images: Images) -> None:
    """Writes each image as `NNNNNN.png`, named by its sample number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in zip(numbers, images, strict=True):
        write_whole(folder / f"{number:06d}.png", _png(image))


def remove_pngs(folder: Path, count: int) -> None:
    """Removes the images that `save_pngs` has named by sample numbers from `count` on: those of an earlier, larger call."""
    for path in folder.glob("*.png"):
        if re.fullmatch("[0-9]{6,}", path.stem) and int(path.stem) >= count:
            path.unlink()


@contextmanager
def npz_stream(path: Path, count: int) -> Iterator[Callable[[Images, NDArray[np.int64] | None], None]]:
    """The sample batch of ADM's evaluation, `arr_0` (uint8 [count, H, W, C]) and, where there are classes, `labels` (int64 [count]).

    Gives a function that takes the next images [n, H, W, C] and labels [n] or None: no more than those are in memory. All must be of one
    shape, and `count` together.
    """
    labels: list[NDArray[np.int64]] = []
    with whole(path) as draft, zipfile.ZipFile(draft, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            begun = False

            def add(images: Images, classes: NDArray[np.int64] | None) -> None:
                nonlocal begun
                if not begun:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                begun = True
                file.write(np.ascontiguousarray(images).data)
                labels.extend([] if classes is None else [classes])

            yield add
        if labels:
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, np.concatenate(labels), allow_pickle=False)


def _png(image: Images) -> bytes:
    grey = image.shape[-1] == 1
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if grey else image).save(buffer, format="PNG")
    return buffer.getvalue()
