"""From a file's bytes to an RGB square: every mode that photographs come in, and ADM's centre crop."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# A closed list: Pillow knows kinds that start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA")


class Unreadable(Exception):
    """Why a file gives no image; the reason is the same on every machine and run."""


def read_square(content: bytes, size: int) -> np.ndarray:
    """An image file as uint8 [3, size, size]: upright, RGB, centre-cropped.

    Raises:
        Unreadable: not an image, cut short, damaged, or of a kind without a defined range.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return square_of(ImageOps.exif_transpose(image), size)
    except UnidentifiedImageError:
        # Pillow's own text holds a memory address.
        raise Unreadable("not an image in a known format" if content else "an empty file") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def square_of(image: Image.Image, size: int) -> np.ndarray:
    """An image as uint8 [3, size, size]: RGB, centre-cropped. Raises Unreadable."""
    return np.ascontiguousarray(np.asarray(centre_crop(to_rgb(image), size)).transpose(2, 0, 1))


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
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise Unreadable(f"{image.width} x {image.height} pixels: too elongated to crop a square from")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
