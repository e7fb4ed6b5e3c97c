"""An image member to a square, exactly as `prepare images` makes one; npy members are arrays of pixels, never pickles."""

import io
import math

import numpy as np
from PIL import Image

from fasttrain.data.prepare.pixels import Unreadable, read_square, square_of


def decode(content: bytes, is_array: bool, size: int) -> np.ndarray:
    """The content of an image or npy member as uint8 [3, size, size].

    Raises:
        Unreadable: damaged, cut short, or of no kind that is read; the reason is the same on every machine and run.
    """
    return square_of(_image_of_array(content), size) if is_array else read_square(content, size)


def _image_of_array(content: bytes) -> Image.Image:
    """uint8 [C, H, W] with one or three channels. The header is looked at before anything is allocated."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise Unreadable("not an npy array") from None
    if dtype != np.uint8 or fortran or len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise Unreadable(f"an array of {dtype} {list(shape)[:5]}, not of uint8 [3, H, W]")
    pixels = content[file.tell() :]
    if len(pixels) != math.prod(shape):
        raise Unreadable(f"{len(pixels)} of {math.prod(shape)} bytes of pixels")
    array = np.frombuffer(pixels, np.uint8).reshape(shape).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if shape[0] == 1 else array))
