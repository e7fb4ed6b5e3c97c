"""What a score keeps of a set of images: the moments of their features, and the vectors of some of them. No image is kept."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.evaluation.features import Features, Images
from fasttrain.evaluation.frechet import Gaussian, Moments

Share = tuple[Moments | None, list[Tensor], int]  # what one process gives of a set: moments, vectors, images left out
MOST_ROWS = 50_000  # whose vectors are kept for precision and recall, in fp32


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of a whole set.

    Attributes:
        gaussian: mean and covariance of the features; of unknown many vectors (None) where a file of statistics gave them.
        rows: [m, D] fp32, the vectors of at most MOST_ROWS of the images; None where there are no images.
        left_out: images that could not be read.
        radii: [m] of the rows, see precision_recall.py; None where they are not known, or the rows too few.
    """

    gaussian: Gaussian
    rows: Tensor | None
    left_out: int = 0
    radii: Tensor | None = None


class Collector:
    """The features of one process's share of a set.

    Args:
        what: the set, for messages.
        features: of its images.
    """

    def __init__(self, what: str, features: Features):
        self.left_out = 0
        self._what = what
        self._features = features
        self._moments: Moments | None = None
        self._rows: list[Tensor] = []

    def update(self, images: Images, kept: NDArray[np.bool_], left_out: int = 0) -> None:
        """Takes in images [n, H, W, C], of which the vectors of `kept` [n] stay; `left_out` others were unreadable.

        Raises:
            UserError: features that are not finite, or images that have none.
        """
        self.left_out += left_out
        if not len(images):
            return
        vectors = torch.from_numpy(self._features(images))
        if not bool(vectors.isfinite().all()):
            raise UserError(f"{self._what}: {self._features.told['name']} features are not finite; the file that makes them cannot be used")
        if self._moments is None:
            self._moments = Moments(vectors.shape[1])
        self._moments.update(vectors)
        self._rows.append(vectors[torch.from_numpy(kept)].float())

    def share(self) -> Share:
        """What `statistics` puts together."""
        return self._moments, self._rows, self.left_out


def statistics(what: str, shares: Iterable[Share]) -> Statistics:
    """Of the whole set, from every process's share.

    Raises:
        UserError: fewer than two images.
    """
    moments: Moments | None = None
    rows: list[Tensor] = []
    left_out = 0
    for theirs, some, missed in shares:
        if moments is None:
            moments = theirs
        elif theirs is not None:
            moments.merge(theirs)
        rows += some
        left_out += missed
    if moments is None:
        raise UserError(f"{what}: no images; at least 2 are needed")
    try:
        return Statistics(moments.gaussian(), torch.cat(rows), left_out)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None


def chosen(count: int, most: int = MOST_ROWS) -> NDArray[np.bool_]:
    """Which of a set's images [count] have their vectors kept: all, or as many as may be in a fixed random choice.

    Not the first ones, nor every so-manieth: sets are sorted by class, and samples take classes by turns.
    """
    kept = np.zeros(count, bool)
    kept[np.random.default_rng(0).permutation(count)[:most]] = True
    return kept
