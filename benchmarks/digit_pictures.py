"""Handwritten digits as class folders of PNGs, at several original sizes and with captions where asked, and a judge of what they show.

    python -m benchmarks.digit_pictures FOLDER [--sizes 4 5 6 7 8] [--captions]

scikit-learn's 1,797 digits of 8 x 8 pixels. A smaller size is the area average of the digit, so that `prepare images --size 8` blurs it
as a photograph from a small file is blurred. Size and caption of a digit are functions of its number.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.svm import SVC

from fasttrain.data.prepare.digits import DigitMaker
from fasttrain.data.prepare.pixels import square_of
from fasttrain.data.shards import ShardSet

SIDE = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "the digit {}",
    "a picture of the number {}",
    "{} written by hand",
    "a small grey {} on black",
    "somebody wrote a {}",
)
OTHER_TEMPLATES = ("the number {}", "a small {} written by hand", "somebody wrote the digit {}")
"""Wordings of the same words that stand beside no picture."""
Images = NDArray[np.uint8]


def caption(digit: int, number: int) -> str:
    """One of the twelve ways to say which digit it is, as a word or a numeral, drawn by the picture's number."""
    chosen = np.random.default_rng((1, number))
    template = TEMPLATES[chosen.integers(len(TEMPLATES))]
    return template.format(WORDS[digit] if chosen.integers(2) else str(digit))


def prompts(templates: Sequence[str]) -> dict[str, int]:
    """Every caption of these wordings, as a word and as a numeral, and its digit; digits take turns."""
    forms = [(template, names) for template in templates for names in (WORDS, [str(digit) for digit in range(10)])]
    return {template.format(names[digit]): digit for template, names in forms for digit in range(10)}


def write_folders(root: Path, sizes: Sequence[int] = (SIDE,), captions: bool = False) -> int:
    """Writes every digit as `root/DIGIT/NNNN.png`, with `NNNN.txt` beside it where captions are wanted; how many there are."""
    maker = DigitMaker()
    for number, (image, digit) in enumerate(zip(maker.images[:, 0], maker.labels, strict=True)):
        folder = root / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        size = sizes[np.random.default_rng((0, number)).integers(len(sizes))]
        reduced(image, size).save(folder / f"{number:04d}.png")
        if captions:
            (folder / f"{number:04d}.txt").write_text(caption(digit, number) + "\n")
    return len(maker.labels)


def reduced(image: Images, size: int) -> Image.Image:
    """A digit [8, 8] as a picture of `size` pixels a side, by area."""
    picture = Image.fromarray(image)
    return picture if size == SIDE else picture.resize((size, size), Image.Resampling.BOX)


def as_prepared(size: int) -> Images:
    """All digits as `prepare images --size 8` stores them when their files are of `size` pixels: [n, 8, 8]."""
    return np.stack([square_of(reduced(image, size), SIDE).pixels[0] for image in DigitMaker().images[:, 0]])


def grey(images: NDArray[Any]) -> NDArray[np.float64]:
    """Images [n, H, W, C] uint8 as [n, H, W] in [0, 1]."""
    return images.mean(axis=-1) / 255


@dataclass(frozen=True)
class Judge:
    """Says which digit a picture shows: a support vector machine on the pixels of the training set.

    Attributes:
        accuracy: on the fifth of the set that it did not see.
        seen, unseen: pictures that it was trained on, and that it was tried on.
    """

    machine: SVC
    accuracy: float
    seen: int
    unseen: int

    @classmethod
    def of(cls, shards: Path) -> "Judge":
        """Trained on prepared shards of [3, 8, 8], whose order is shuffled; four fifths of them, unmirrored."""
        found = ShardSet.open(shards)
        gathered = found.gather(np.arange(len(found)))
        pixels = grey(gathered.arrays.transpose(0, 2, 3, 1)).reshape(len(found), -1)
        labels = gathered.labels
        seen = len(found) * 4 // 5
        machine = SVC(C=10.0, gamma="scale").fit(pixels[:seen], labels[:seen])
        return cls(machine, float((machine.predict(pixels[seen:]) == labels[seen:]).mean()), seen, len(found) - seen)

    def agreement(self, images: Images, labels: NDArray[np.int64]) -> float:
        """The share of images [n, 8, 8, C] that show the digit of their label."""
        return float((self.machine.predict(grey(images).reshape(len(images), -1)) == labels).mean())


def main() -> None:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[SIDE], help="original sizes in pixels, one drawn for each digit (8)")
    parser.add_argument("--captions", action="store_true", help="write a caption beside each picture")
    args = parser.parse_args()
    print(f"{write_folders(args.folder, args.sizes, args.captions)} digits in {args.folder}")


if __name__ == "__main__":
    main()
