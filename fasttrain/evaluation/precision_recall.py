"""Precision and recall of samples: the share of them that lies among the reference, and of the reference that lies among them.

A set's manifold is the union of balls around its vectors, each as large as the distance to its k-th nearest other vector of the set.

    precision = share of samples inside the reference's manifold    recall = share of the reference inside the samples' manifold
                                                                             [Kynkaanniemi et al. 2019, Eq. 1 and 2, k = 3]

Both grow with the number of vectors beyond any other: the paper compares as many samples as references, 50,000.
"""

from typing import NamedTuple

import torch
from torch import Tensor

K = 3
BLOCK = 1 << 25  # distances held at once: 256 MiB


class PrecisionRecall(NamedTuple):
    """Both shares, and what they were measured on."""

    precision: float
    recall: float
    k: int
    samples: int
    reference: int


def precision_recall(samples: Tensor, reference: Tensor, k: int = K) -> PrecisionRecall:
    """Of feature vectors [n, D] and [m, D] on one device; memory beside them is bounded by BLOCK.

    Raises:
        ValueError: a set of at most k vectors, or vectors of different lengths.
    """
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of each kind, got {len(samples)} samples and {len(reference)}")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features have different lengths: {samples.shape[1]} and {reference.shape[1]}")
    centre = reference.double().mean(dim=0)
    ours, theirs = samples.double() - centre, reference.double() - centre
    return PrecisionRecall(
        precision=_share_inside(ours, theirs, _radii(theirs, k)),
        recall=_share_inside(theirs, ours, _radii(ours, k)),
        k=k,
        samples=len(ours),
        reference=len(theirs),
    )


def _radii(rows: Tensor, k: int) -> Tensor:
    """[n]: the squared distance of each row to its k-th nearest other row."""
    nearest = [_squared(block, rows).topk(k + 1, dim=1, largest=False).values[:, -1] for block in _blocks(rows, len(rows))]
    return torch.cat(nearest)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of points that lie in at least one ball."""
    inside = sum(int((_squared(block, centres) <= radii).any(dim=1).sum()) for block in _blocks(points, len(centres)))
    return inside / len(points)


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, BLOCK // columns))


def _squared(rows: Tensor, others: Tensor) -> Tensor:
    """Squared distances [n, m] = |x|^2 + |y|^2 - 2 x.y in float64; what rounding leaves of equal vectors' is zero."""
    sizes = rows.square().sum(dim=1, keepdim=True) + others.square().sum(dim=1)
    distances = sizes - 2 * rows @ others.T
    return torch.where(distances > sizes * (rows.shape[1] * torch.finfo(rows.dtype).eps), distances, 0.0)
