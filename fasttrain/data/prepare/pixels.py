"""From a file's bytes to an RGB square: every mode that photographs come in, and ADM's centre crop, or another square."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fasttrain.data.crops import Scale, boxes

# A closed list: Pillow knows kinds that start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA")
_SEED = 0


class Unreadable(Exception):
    """Why a file gives no image; the reason is the same on every machine and run."""


class Square(NamedTuple):
    """An image as it is stored, uint8 [3, size, size], and the facts about it, as `facts.RECORDED` names them."""

    pixels: np.ndarray
    facts: tuple[float, ...]


class Crop(NamedTuple):
    """Which square of an image: one of `scale` of the largest one's area, anywhere, as `key` draws it."""

    scale: Scale
    key: int


def read_square(content: bytes, size: int, crop: Crop | None = None) -> Square:
    """An image file as a square: upright, RGB, the whole height or width from the centre, or another crop.

    Raises:
        Unreadable: not an image, cut short, damaged, or of a kind without a defined range.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return square_of(ImageOps.exif_transpose(image), size, crop)
    except UnidentifiedImageError:
        # Pillow's own text holds a memory address.
        raise Unreadable("not an image in a known format" if content else "an empty file") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def square_of(image: Image.Image, size: int, crop: Crop | None = None) -> Square:
    """An image as a square, RGB. Raises Unreadable."""
    rgb = to_rgb(image)
    if crop is None:
        square, facts = centre_crop(rgb, size), centre_facts(*rgb.size, size)
    else:
        ((side, top, left),) = boxes(_SEED, np.array([crop.key]), rgb.height, rgb.width, crop.scale).tolist()
        square = centre_crop(rgb.crop((left, top, left + side, top + side)), size)
        facts = (rgb.height, rgb.width, top * size / side, left * size / side, side / min(rgb.size))
    return Square(np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), facts)


def centre_facts(width: int, height: int, size: int) -> tuple[float, ...]:
    """The facts about an image of this size whose centre is cropped."""
    wide, high = _resized(*_halved(width, height, size), size)
    return (height, width, (high - size) // 2, (wide - size) // 2, 1.0)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from greyscale, palette, CMYK, 16-bit and transparent images (these over white, as they are shown).

    Raises:
        Unreadable: floating-point pixels, which have no defined range.
    """
    if image.mode == "F":
        raise Unreadable("floating-point pixels have no defined range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion cuts 16 bits off at 255 instead of scaling them: 65535 / 257 = 255.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square [Dhariwal & Nichol 2021, "ADM"]: halve by BOX while at least twice too large, BICUBIC to `size`, crop.

    Raises:
        Unreadable: so elongated that the resized image would not fit in memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = _resized(*image.size, size)
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise Unreadable(f"{image.width} x {image.height} pixels: too elongated to crop a square from")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _halved(width: int, height: int, size: int) -> tuple[int, int]:
    """The size after the BOX halvings of `centre_crop`."""
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    return width, height


def _resized(width: int, height: int, size: int) -> tuple[int, int]:
    """The size at which the short side is `size`."""
    scale = size / min(width, height)
    return round(width * scale), round(height * scale)
