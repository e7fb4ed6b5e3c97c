"""An image member to a square, exactly as `prepare images` makes one; npy members are arrays of pixels, never pickles."""

import io
import math
import re

import numpy as np
from PIL import ExifTags, Image

from fasttrain.data.prepare.pixels import FORMATS, Unreadable, read_square, square_of

# As numpy writes it, version 1.0. numpy's own reader calls Python's parser, which two threads at once can crash in Python 3.11.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9})\), \} *\n", re.DOTALL
)
# Where a PNG may say that it lies on its side; Pillow decodes it whole to look there.
_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_LYING = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def decode(content: bytes, is_array: bool, size: int) -> np.ndarray:
    """The content of an image or npy member as uint8 [3, size, size].

    Raises:
        Unreadable: damaged, cut short, or of no kind that is read; the reason is the same on every machine and run.
    """
    return (square_of(_image_of_array(content), size) if is_array else read_square(content, size)).pixels


def dimensions(content: bytes, is_array: bool) -> tuple[int, int]:
    """Height and width of an image or npy member, upright, from its header; (0, 0) where that cannot be read: nor can the image then."""
    if is_array:
        header = _HEADER.match(content)
        return (int(header[2]), int(header[3])) if header else (0, 0)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            marked = image.format != "PNG" or any(mark in content for mark in _PNG_MARKS)
            lying = marked and image.getexif().get(ExifTags.Base.Orientation) in _LYING
            return image.size if lying else image.size[::-1]
    except Exception:  # a damaged header makes Pillow raise anything; decoding tells what
        return 0, 0


def _image_of_array(content: bytes) -> Image.Image:
    """uint8 [C, H, W] with one or three channels. The header is looked at before anything is allocated."""
    header = _HEADER.match(content)
    if header is None:
        raise Unreadable("not an npy array, or not of uint8 [3, H, W]")
    shape = tuple(int(number) for number in header.groups())
    if shape[0] not in (1, 3) or min(shape) < 1:
        raise Unreadable(f"an array of {list(shape)}, not of [3, H, W]")
    pixels = content[header.end() :]
    if len(pixels) != math.prod(shape):
        raise Unreadable(f"{len(pixels)} of {math.prod(shape)} bytes of pixels")
    array = np.frombuffer(pixels, np.uint8).reshape(shape).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if shape[0] == 1 else array))
