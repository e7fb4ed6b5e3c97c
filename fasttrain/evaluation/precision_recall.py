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
BLOCK = 1 << 23  # distances of a block: 64 MiB


class PrecisionRecall(NamedTuple):
    """Both shares, and what they were measured on."""

    precision: float
    recall: float
    k: int
    samples: int
    reference: int


def precision_recall(samples: Tensor, reference: Tensor, k: int = K, reference_radii: Tensor | None = None) -> PrecisionRecall:
    """Of feature vectors [n, D] and [m, D] of any float dtype on one device.

    Memory: both sets in float64, and between two and three times BLOCK distances. Time: 5,000 vectors of each with 2048 numbers took one
    thread of a busy machine 14 s, and the reference's radii 8 s, once; both grow with n m, so 50,000 of each need 24 and 13 minutes.

    Args:
        reference_radii: `radii(reference, k)`, where they are known: they do not depend on the samples.

    Raises:
        ValueError: a set of at most k vectors, or vectors of different lengths.
    """
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of each kind, got {len(samples)} samples and {len(reference)}")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features have different lengths: {samples.shape[1]} and {reference.shape[1]}")
    theirs_radii = radii(reference, k) if reference_radii is None else reference_radii
    ours, theirs = _Centred.of(samples, _centre(reference)), _Centred.of(reference, _centre(reference))
    precise, recalled = _insides(ours, radii(samples, k), theirs, theirs_radii)
    return PrecisionRecall(precise / len(samples), recalled / len(reference), k, len(samples), len(reference))


def radii(rows: Tensor, k: int = K) -> Tensor:
    """[n] float64: the squared distance of each of the vectors [n, D] to its k-th nearest other one."""
    every = _Centred.of(rows, _centre(rows))
    nearest = [every.part(at).squared(every).topk(k + 1, dim=1, largest=False).values[:, -1] for at in _blocks(len(rows), len(rows))]
    return torch.cat(nearest)


class _Centred(NamedTuple):
    """Vectors [n, D] float64 without a common mean, which would cost digits, and their squared lengths [n]."""

    rows: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, rows: Tensor, centre: Tensor) -> "_Centred":
        centred = torch.sub(rows, centre)
        return cls(centred, torch.einsum("nd,nd->n", centred, centred))

    def part(self, at: slice) -> "_Centred":
        return _Centred(self.rows[at], self.sizes[at])

    def squared(self, others: "_Centred") -> Tensor:
        """Squared distances [n, m] = |x|^2 + |y|^2 - 2 x.y; what rounding leaves of equal vectors' is zero."""
        sizes = self.sizes[:, None] + others.sizes
        distances = torch.mm(self.rows, others.rows.T).mul_(-2).add_(sizes)
        return distances.masked_fill_(distances <= sizes.mul_(self.rows.shape[1] * torch.finfo(sizes.dtype).eps), 0.0)


def _insides(ours: _Centred, our_radii: Tensor, theirs: _Centred, their_radii: Tensor) -> tuple[int, int]:
    """How many of our vectors lie in at least one of their balls, and how many of theirs in one of ours."""
    precise, recalled = 0, torch.zeros(len(their_radii), dtype=torch.bool, device=their_radii.device)
    for at in _blocks(len(our_radii), len(their_radii)):
        distances = ours.part(at).squared(theirs)
        precise += int((distances <= their_radii).any(dim=1).sum())
        recalled |= (distances <= our_radii[at, None]).any(dim=0)
        del distances  # before the next block's are made
    return precise, int(recalled.sum())


def _centre(rows: Tensor) -> Tensor:
    return rows.mean(dim=0, dtype=torch.float64)


def _blocks(rows: int, columns: int) -> list[slice]:
    size = max(1, BLOCK // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]
