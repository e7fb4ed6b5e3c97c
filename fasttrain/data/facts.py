"""What is recorded of each image when a set is made, and the controls that a model is told from it.

    height, width   of the original image, upright, in pixels
    top, left       what the crop cut off above and to the left, in pixels of the original resized so that the crop is as large as the
                    stored square [Podell et al. 2023, "SDXL", section 2.2]
    share           the crop's side, of the original's short side

    size = (height, width)    crop = (top, left)    flip = 1 where this visit is mirrored    aspect = 100 log2(width / height)

Controls are embedded by sinusoids of periods from 2 pi on, which tell apart numbers about 1 apart, as pixels are: hence the 100 of the
aspect (0 square, 41.5 for 4:3, 83 for 16:9, negative upright). Where training looks at a part of the stored square, or at a smaller copy,
`crop` is that of the square it sees. In a mirrored visit `left` is what was cut off on the side that is left there.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from fasttrain.cond import control_columns
from fasttrain.data.index import Index
from fasttrain.errors import UserError

RECORDED = ("height", "width", "top", "left", "share")
ASPECT_UNIT = 100.0
# Facts in which an image may lie, the ends included: no side is empty, and no crop larger than what it is cut from.
_POSSIBLE = {"height": (1, 2**31), "width": (1, 2**31), "top": (0, 2**31), "left": (0, 2**31), "share": (1e-9, 1)}
_NEEDED = {"size": ("height", "width"), "crop": RECORDED, "flip": (), "aspect": ("height", "width")}


class Seen(NamedTuple):
    """Samples as the model sees them.

    Attributes:
        facts: by name, float64 [n].
        pixels: side of the stored square, before an autoencoder.
        size: side of the square that the model sees, before an autoencoder.
        box: int64 [n, 3]: side, top and left of what the model sees of the stored square.
        mirrored: whether they are.
    """

    facts: Mapping[str, np.ndarray]
    pixels: int
    size: int
    box: np.ndarray
    mirrored: bool


def require_recorded(controls: Iterable[str], index: Index, place: str) -> None:
    """Raises UserError where a control needs what was not recorded of the images."""
    for control in controls:
        if missing := [name for name in _NEEDED[control] if name not in index.facts]:
            raise UserError(
                f"model.controls: {control!r} needs the {', '.join(missing)} of each image, which {place} does not hold; "
                "prepare the set with `fasttrain prepare images` or `latents`, or leave the control out"
            )


def needed(controls: Iterable[str]) -> tuple[str, ...]:
    """The recorded facts that these controls are made of."""
    return tuple(dict.fromkeys(name for control in controls for name in _NEEDED[control]))


def impossible(facts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which samples have facts that no image has: bool [n]. 0 stands for what is not known of an image."""
    # Comparisons with NaN are false.
    return ~np.logical_and.reduce([(values >= _POSSIBLE[name][0]) & (values <= _POSSIBLE[name][1]) for name, values in facts.items()])


def control_numbers(controls: Iterable[str], seen: Seen) -> np.ndarray:
    """float32 [n, K], the columns as `control_columns` orders them."""
    made = {column: values for control in controls for column, values in _MADE[control](seen).items()}
    return np.stack([made[column] for column in control_columns(controls)], axis=-1).astype(np.float32)


def defaults(index: Index) -> dict[str, tuple[float, ...]]:
    """What samples are told by default: an original of the training square's own size, not cropped, not mirrored."""
    return {"size": (index.pixels,) * 2, "crop": (0.0, 0.0), "flip": (0.0,), "aspect": (0.0,)}


def _size(seen: Seen) -> dict[str, np.ndarray]:
    return {name: seen.facts[name] for name in ("height", "width")}


def _crop(seen: Seen) -> dict[str, np.ndarray]:
    height, width, top, left, share = (seen.facts[name] for name in RECORDED)
    side, down, across = seen.box.T
    enlarged = seen.size / side  # of the stored square, to what the model sees
    left = (left + across) * enlarged
    if seen.mirrored:
        whole = width / (share * np.minimum(height, width)) * seen.pixels * enlarged
        left = np.maximum(whole - left - seen.size, 0)
    return {"top": (top + down) * enlarged, "left": left}


def _flip(seen: Seen) -> dict[str, np.ndarray]:
    return {"flip": np.full(len(seen.box), float(seen.mirrored))}


def _aspect(seen: Seen) -> dict[str, np.ndarray]:
    return {"aspect": ASPECT_UNIT * np.log2(seen.facts["width"] / seen.facts["height"])}


_MADE: dict[str, Callable[[Seen], dict[str, np.ndarray]]] = {"size": _size, "crop": _crop, "flip": _flip, "aspect": _aspect}
