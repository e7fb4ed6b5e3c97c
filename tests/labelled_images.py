"""Images that say in their pixels which they are, so that a test sees whether a label belongs to its image; and tars of them."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, CLASSES = 32, 10
_BITS = 16  # one 8 x 8 block each: bits survive JPEG
Members = list[tuple[str, bytes]]


def pixels(number: int) -> np.ndarray:
    """uint8 [3, 32, 32] of 16 blocks, black or white: the bits of a number below 65,536."""
    bits = (number >> np.arange(_BITS)) & 1
    grey = np.kron(bits.reshape(4, 4).astype(np.uint8) * 215 + 20, np.ones((8, 8), np.uint8))
    return np.broadcast_to(grey, (3, SIDE, SIDE)).copy()


def number_of(image: np.ndarray) -> int:
    """The number that an image [3, 32, 32] shows."""
    bits = image.astype(np.float64).mean(0).reshape(4, 8, 4, 8).mean((1, 3)).reshape(-1) > 127.5
    return int((bits << np.arange(_BITS)).sum())


def label_of(number: int) -> int:
    """The class of an image, by its number."""
    return number * 7 % CLASSES


def encoded(number: int, ending: str) -> bytes:
    """The image as a jpg, png, webp or npy file."""
    file = io.BytesIO()
    if ending == "npy":
        np.save(file, pixels(number))
    else:
        image = Image.fromarray(pixels(number).transpose(1, 2, 0))
        image.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending], quality=90)
    return file.getvalue()


def sample(number: int, ending: str = "png", key: str | None = None, label: str = "cls") -> Members:
    """The members of one sample as webdataset's TarWriter sorts them; `label` "" leaves it out."""
    key = f"{number:09d}" if key is None else key
    members = [(f"{key}.{ending}", encoded(number, ending))]
    if label == "cls":
        members.append((f"{key}.cls", str(label_of(number)).encode()))
    elif label == "json":
        members.append((f"{key}.json", b'{"label": %d, "url": "x"}' % label_of(number)))
    return sorted(members)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of these members, as Python's tarfile writes it."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_set(folder: Path, counts: Sequence[int], endings: Sequence[str] = ("png",), restart_keys: bool = True) -> Path:
    """Shards of so many samples each, numbered over the whole set; keys begin anew in each shard, as img2dataset's may."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members: Members = []
        for row in range(count):
            members += sample(number, endings[number % len(endings)], f"{row:06d}" if restart_keys else None)
            number += 1
        write_tar(folder / f"train-{shard:05d}.tar", members)
    return folder


def told_apart(arrays: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, bool]]:
    """Of each image: its number, and whether the label beside it is its own."""
    for image, label in zip(arrays, labels.tolist(), strict=True):
        number = number_of(image)
        yield number, label == label_of(number)
