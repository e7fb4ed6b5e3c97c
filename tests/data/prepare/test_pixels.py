"""Every mode a photograph comes in, and ADM's crop."""

import io

import numpy as np
import pytest
from PIL import Image

from fasttrain.data.prepare.pixels import Unreadable, centre_crop, read_square

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (32, 32, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_an_image_of_the_right_size_is_kept_as_it_is():
    square = read_square(encoded(Image.fromarray(RGB)), 32).pixels
    assert square.dtype == np.uint8 and square.flags.c_contiguous
    np.testing.assert_array_equal(square, RGB.transpose(2, 0, 1))


def test_greyscale_becomes_three_equal_channels():
    grey = RGB[:, :, 0]
    np.testing.assert_array_equal(read_square(encoded(Image.fromarray(grey)), 32).pixels, np.stack([grey] * 3))


def test_sixteen_bits_are_scaled_not_cut_off():
    wide = (RGB[:, :, 0].astype(np.uint16) * 257) ^ 3
    np.testing.assert_array_equal(read_square(encoded(Image.fromarray(wide)), 32).pixels[1], RGB[:, :, 0])


def test_one_bit_becomes_black_and_white():
    square = read_square(encoded(Image.fromarray(RGB[:, :, 0] > 128)), 32).pixels
    np.testing.assert_array_equal(square[2], np.where(RGB[:, :, 0] > 128, 255, 0))


def test_palette_gives_its_colours():
    palette = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(read_square(encoded(palette), 32).pixels, np.asarray(palette.convert("RGB")).transpose(2, 0, 1))


def test_cmyk_gives_its_colours():
    cmyk = Image.fromarray(RGB).convert("CMYK")
    np.testing.assert_array_equal(read_square(encoded(cmyk, "TIFF"), 32).pixels, RGB.transpose(2, 0, 1))
    jpeg = read_square(encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95), 32).pixels
    np.testing.assert_allclose(jpeg.reshape(3, -1).mean(1), [255, 0, 0], atol=4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_and_opaque_ones_unchanged(mode: str):
    shown = Image.fromarray(RGB).convert("L" if mode == "LA" else "RGB")
    alpha = Image.fromarray(np.where(np.arange(32)[:, None] < 16, 0, 255).astype(np.uint8).repeat(32, 1))
    if mode == "P":
        image = Image.new("P", (32, 32), 0)
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.paste(1, (0, 16, 32, 32))
        square = read_square(encoded(image, transparency=0), 32).pixels
        expected = np.broadcast_to(np.array([200, 100, 50])[:, None, None], (3, 16, 32))
    else:
        image = shown.copy()
        image.putalpha(alpha)
        square = read_square(encoded(image), 32).pixels
        expected = np.asarray(shown.convert("RGB")).transpose(2, 0, 1)[:, 16:]
    assert (square[:, :16] == 255).all()
    np.testing.assert_array_equal(square[:, 16:], expected)


@pytest.mark.parametrize(("orientation", "turn"), [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])
def test_exif_rotation_is_applied(orientation: int, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    square = read_square(encoded(Image.fromarray(RGB), exif=exif), 32).pixels
    np.testing.assert_array_equal(square, turn(RGB).transpose(2, 0, 1))


def test_a_single_pixel_fills_the_square():
    square = read_square(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), 16).pixels
    np.testing.assert_array_equal(square, np.broadcast_to(np.array([1, 2, 3])[:, None, None], (3, 16, 16)))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (65, 40), (40, 67), (129, 200), (31, 500), (16, 17), (500, 375)])
def test_the_crop_is_adms(width: int, height: int):
    """ADM's recipe, with its own words as the oracle: halve by BOX, then BICUBIC to the shorter side, then the centre."""
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))
    expected = image
    while min(expected.size) >= 64:
        expected = expected.resize((expected.size[0] // 2, expected.size[1] // 2), Image.Resampling.BOX)
    ratio = 32 / min(expected.size)
    pixels = np.array(expected.resize((round(expected.size[0] * ratio), round(expected.size[1] * ratio)), Image.Resampling.BICUBIC))
    y, x = (pixels.shape[0] - 32) // 2, (pixels.shape[1] - 32) // 2
    np.testing.assert_array_equal(np.asarray(centre_crop(image, 32)), pixels[y : y + 32, x : x + 32])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"this is no image", "not an image in a known format"),
        (encoded(Image.fromarray(RGB), "JPEG")[:400], "(?i)truncated"),
        (encoded(Image.fromarray(RGB))[:-600], "truncated|broken|end of|unrecognized"),
        (encoded(Image.fromarray(RGB[:, :, 0].astype(np.float32)), "TIFF"), "floating-point pixels"),
        (encoded(Image.new("1", (1, 30000))), "too elongated"),
    ],
)
def test_what_is_unreadable_says_why(content: bytes, reason: str):
    told = []
    for _ in range(2):
        with pytest.raises(Unreadable, match=reason) as caught:
            read_square(content, 256)
        told.append(str(caught.value))
    assert told[0] == told[1] and "0x" not in told[0]
