"""What stands in for a sample that cannot be read: a function of the position alone, so that damage never changes the order.

    attempt k at position n:  among[floor(u(seed, n, k) * len(among))],  u from Philox of purpose SUBSTITUTE, k = 0, 1, ...

The first readable one is taken. Which samples are readable is a property of the files, so all processes, threads and restarts agree.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from fasttrain_kernels.philox import Purpose, philox

from fasttrain.errors import UserError

MOST_ATTEMPTS = 1000


class Gathered(NamedTuple):
    """Samples: arrays [n, *shape] of the stored dtype, labels int64 [n], and which of them could be read, bool [n]."""

    arrays: np.ndarray
    labels: np.ndarray
    readable: np.ndarray


def substitutes(seed: int, positions: np.ndarray, attempt: int, among: range) -> np.ndarray:
    """The sample_ids tried at these positions after `attempt` others: int64 [n] -> int64 [n], in `among`."""
    high, low, _, _ = philox(seed, attempt, Purpose.SUBSTITUTE, torch.from_numpy(np.asarray(positions, np.int64)))
    u = ((high.numpy() << 21) | (low.numpy() >> 11)) / 2.0**53
    return among.start + np.floor(u * len(among)).astype(np.int64)


def replace_unreadable(
    gather: Callable[[np.ndarray], Gathered],
    draw: Callable[[np.ndarray, int], np.ndarray],
    positions: np.ndarray,
    ids: np.ndarray,
) -> tuple[np.ndarray, Gathered, int]:
    """The samples of these ids, the unreadable ones replaced.

    Args:
        gather: sample_ids -> samples.
        draw: (positions, attempt) -> the sample_ids to try there.
        positions: int64 [n].
        ids: int64 [n], what the order says stands at the positions.

    Returns:
        The sample_ids really used, their samples, and how many positions were replaced.

    Raises:
        UserError: a thousand substitutes of one position could not be read.
    """
    found = gather(ids)
    if found.readable.all():
        return ids, found, 0
    ids = ids.copy()
    missing = np.flatnonzero(~found.readable)
    replaced = len(missing)
    for attempt in range(MOST_ATTEMPTS):
        ids[missing] = draw(positions[missing], attempt)
        tried = gather(ids[missing])
        found.arrays[missing], found.labels[missing] = tried.arrays, tried.labels
        missing = missing[~tried.readable]
        if not len(missing):
            found.readable[:] = True
            return ids, found, replaced
    raise UserError(f"data.train: {MOST_ATTEMPTS} substitutes for position {positions[missing[0]]} are unreadable; restore the shards")
