"""Controls against values worked out by hand, in the plain and in the mirrored view."""

import numpy as np
import pytest

from fasttrain.data.facts import RECORDED, Seen, control_numbers, defaults, impossible, needed, require_recorded
from fasttrain.data.index import Index
from fasttrain.errors import UserError

# A photograph of 1000 x 500 pixels whose middle became 256 x 256: resized to 512 x 256, 128 columns are cut off on either side.
LANDSCAPE = (500, 1000, 0, 128, 1)
# One of 400 x 600 (upright), of which the square of 200 pixels at row 300 and column 50 became 256 x 256.
UPRIGHT = (600, 400, 300 * 256 / 200, 50 * 256 / 200, 0.5)


def seen(*rows: tuple[float, ...], size: int = 256, box: tuple[int, int, int] = (256, 0, 0), mirrored: bool = False) -> Seen:
    facts = dict(zip(RECORDED, np.array(rows, np.float64).T, strict=True))
    return Seen(facts, 256, size, np.array([box]).repeat(len(rows), 0), mirrored)


def numbers(controls: list[str], *rows: tuple[float, ...], **how: object) -> list[list[float]]:
    return control_numbers(controls, seen(*rows, **how)).tolist()


def test_columns_stand_in_the_order_of_the_controls_and_not_of_the_asking():
    found = control_numbers(["flip", "crop", "size"], seen(LANDSCAPE, UPRIGHT))
    assert found.dtype == np.float32
    assert found.tolist() == [[500, 1000, 0, 128, 0], [600, 400, 384, 64, 0]]


def test_aspect_is_symmetric_about_the_square_and_told_apart_by_a_sinusoid():
    (wide,), (square,), (upright,) = numbers(["aspect"], LANDSCAPE, (10, 10, 0, 0, 1), (1000, 500, 128, 0, 1))
    assert (wide, square, upright) == (100, 0, -100)
    ((photo,),) = numbers(["aspect"], (300, 400, 0, 43, 1))
    assert photo == pytest.approx(100 * np.log2(4 / 3))


def test_in_a_mirror_left_is_what_the_other_side_lost():
    # 1000 x 500 loses 128 on both sides; 400 x 600 at twice 256 / 400 is 512 wide, and keeps 64 .. 320 of it.
    assert numbers(["crop"], LANDSCAPE, UPRIGHT, mirrored=True) == [[0, 128], [384, 512 - 64 - 256]]
    assert numbers(["flip"], LANDSCAPE, mirrored=True) == [[1]]
    assert numbers(["size", "aspect"], LANDSCAPE, mirrored=True) == numbers(["size", "aspect"], LANDSCAPE)


def test_a_crop_of_the_stored_square_counts_in_pixels_of_what_the_model_sees():
    # 128 of the 256 stored pixels, at row 32 and column 64, seen as 64: everything is half as large.
    assert numbers(["crop"], LANDSCAPE, size=64, box=(128, 32, 64)) == [[16, (128 + 64) / 2]]
    assert numbers(["crop"], LANDSCAPE, size=64, box=(128, 32, 64), mirrored=True) == [[16, 256 - 96 - 64]]
    assert numbers(["size"], LANDSCAPE, size=64, box=(128, 32, 64)) == [[500, 1000]]


def test_the_whole_square_made_smaller_has_a_smaller_crop():
    assert numbers(["crop"], LANDSCAPE, size=64, box=(256, 0, 0)) == [[0, 32]]


def _index(*facts: str) -> Index:
    return Index.model_construct(facts=facts, pixels=512)


def test_only_what_is_asked_for_is_needed():
    assert needed(["flip"]) == () and needed(["size", "aspect"]) == ("height", "width") and needed(["crop", "size"]) == RECORDED
    require_recorded(["flip"], _index(), "set")
    require_recorded(["size", "crop", "flip", "aspect"], _index(*RECORDED), "set")


@pytest.mark.parametrize(
    ("control", "missing"), [("size", "height, width"), ("crop", "height, width, top, left, share"), ("aspect", "height")]
)
def test_a_control_that_the_set_cannot_give_is_named(control: str, missing: str):
    with pytest.raises(UserError, match=rf"model\.controls: '{control}' needs the {missing}.* which shards/x does not hold"):
        require_recorded(["flip", control], _index(), "shards/x")


def test_samples_are_told_of_a_whole_square_of_the_training_size():
    assert defaults(_index()) == {"size": (512, 512), "crop": (0, 0), "flip": (0,), "aspect": (0,)}


def test_what_no_image_can_be_is_told_by_sample():
    rows = [(1, 1, 0, 0, 1), (0, 5, 0, 0, 1), (5, 0, 0, 0, 1), (5, 5, -1, 0, 1), (5, 5, 0, -1, 1), (5, 5, 0, 0, 0), (5, 5, 0, 0, 1.01)]
    rows += [(np.nan, 5, 0, 0, 1), (5, np.inf, 0, 0, 1), (5, 5, np.inf, 0, 1), (5, 5, 0, 0, np.nan), LANDSCAPE, UPRIGHT]
    assert impossible(seen(*rows).facts).tolist() == [False, *[True] * 10, False, False]
    assert not np.any(impossible({}))
