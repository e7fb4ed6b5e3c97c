"""Per-class agreement: how often a classifier sees in a sample the class that it was asked to show."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Agreement:
    """Counts of samples. The classifier itself errs: its held-out accuracy, kept beside it, is what real images reach.

    Args:
        asked: int64 [K], samples asked to show each class; agreed: int64 [K], of these the ones in which the classifier sees it.
    """

    asked: NDArray[np.int64]
    agreed: NDArray[np.int64]

    @classmethod
    def of(cls, asked: NDArray[np.int64], seen: NDArray[np.int64], classes: int) -> "Agreement":
        """From the classes asked for [n] and seen [n]."""
        return cls(np.bincount(asked, minlength=classes), np.bincount(asked[asked == seen], minlength=classes))

    @classmethod
    def none(cls, classes: int) -> "Agreement":
        """Of no samples yet."""
        return cls(np.zeros(classes, np.int64), np.zeros(classes, np.int64))

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.asked + other.asked, self.agreed + other.agreed)

    def told(self, classes: Sequence[str]) -> dict[str, Any]:
        """For a score: the share over all samples, and of each class that was asked for, with their numbers."""
        each = {
            name: {"samples": int(asked), "share": float(agreed / asked)}
            for name, asked, agreed in zip(classes, self.asked, self.agreed, strict=True)
            if asked
        }
        return {"share": float(self.agreed.sum() / self.asked.sum()), "classes": each}
