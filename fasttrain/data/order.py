"""Which sample is seen at which position: a pure function of (seed, n), with locality.

    epoch e = n // N, p = n % N         N samples, each once an epoch
    1. the epoch's shards are permuted and joined to one sequence of N samples;
    2. the sequence is cut into S streams of ceil((N - s) / S) samples; p takes them in turn: stream p % S, place p // S in it;
    3. inside a stream, samples are permuted within windows of a few shards.

A rank of a world that divides S then reads whole streams, a few shards at a time. A set of no more shards than streams has no locality
to keep: its whole epoch is permuted at once. Permutations sort Philox integers of the purpose ORDER, so the order depends on nothing
but the seed: not on ranks, micro-batches, threads or restarts.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from fasttrain_kernels.philox import Purpose, philox

from fasttrain.data.substitutes import substitutes

_MAX_BLOCKS = 1 << 32
_LOOKS = 4


def permutation(samples: int, seed: int, epoch: int = 0, block: int = 0) -> np.ndarray:
    """A permutation of 0 .. samples - 1, int64: the stable order of 63-bit Philox integers keyed by (seed, epoch, block).

    Raises:
        ValueError: more elements or blocks than the 32-bit counters hold.
    """
    if samples >= _MAX_BLOCKS or not 0 <= block < _MAX_BLOCKS:
        raise ValueError(f"a permutation has fewer than 2^32 elements and blocks; got {samples} and block {block}")
    high, low, _, _ = philox(seed, torch.arange(samples), Purpose.ORDER, torch.tensor((epoch << 32) | block))
    return np.argsort((high.numpy() << 31) | (low.numpy() >> 1), kind="stable")


class SampleOrder(Protocol):
    """Anything that tells which sample_id stands at a position, what may stand in for it, and which shards come next."""

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """int64 positions [n] -> int64 sample_ids [n]."""
        ...

    def substitutes(self, positions: np.ndarray, attempt: int) -> np.ndarray:
        """int64 positions [n] -> the sample_ids to try there after `attempt` others, int64 [n]."""
        ...

    def stretch(self, position: int) -> int:
        """A number that changes when other shards come next."""
        ...

    def shards_ahead(self, position: int, rank: int, world_size: int) -> list[int]:
        """The shards that a rank reads from this position on, as far as is worth fetching, soonest first."""
        ...


class Order:
    """The training order over sample_ids 0 .. samples - 1.

    Args:
        samples: how many samples training draws from; those of `shard_samples` beyond them are held out.
        shard_samples: samples of each shard of the whole set, in order.
        seed: 64-bit key.
        streams: S; locality is best where the world size divides it.
        window_shards: shards that a stream's shuffle reaches over.
    """

    def __init__(self, samples: int, shard_samples: Sequence[int], seed: int, streams: int = 64, window_shards: int = 4):
        if not 0 < samples <= sum(shard_samples):
            raise ValueError(f"samples must lie in 1 .. {sum(shard_samples)}, the shards' total; got {samples}")
        if streams < 1 or window_shards < 1:
            raise ValueError(f"streams and window_shards must be at least 1; got {streams} and {window_shards}")
        starts = np.cumsum([0, *shard_samples])[:-1]
        self.samples = samples
        self.seed = seed
        self._starts = starts[starts < samples]
        self._counts = np.minimum(np.asarray(shard_samples, np.int64)[: len(self._starts)], samples - self._starts)
        local = len(self._counts) > streams
        self.streams = streams if local else 1
        self.window = window_shards * -(-samples // len(self._counts)) if local else samples
        # A batch of consecutive positions touches every stream: their windows of this and of the next stretch must fit.
        self._shuffled: Callable[[int, int, int], np.ndarray] = functools.lru_cache(2 * self.streams)(self._shuffle_window)
        self._shard_order: Callable[[int], tuple[np.ndarray, np.ndarray]] = functools.lru_cache(4)(self._permute_shards)

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """The sample_id of each position: int64 [n], positions >= 0 in any order -> int64 [n]."""
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions start at 0; got {positions.min()}")
        epoch, p = np.divmod(positions, self.samples)
        place, stream = np.divmod(p, self.streams)
        window, row = np.divmod(place, self.window)
        order = np.lexsort((window, stream, epoch))
        key = np.stack([epoch, stream, window])[:, order]
        starts = np.flatnonzero(np.any(np.diff(key, prepend=-1), axis=0))
        ids = np.empty_like(p)
        for start, stop in pairwise([*starts, len(order)]):
            group = order[start:stop]
            ids[group] = self._shuffled(*key[:, start].tolist())[row[group]]
        return ids

    def substitutes(self, positions: np.ndarray, attempt: int) -> np.ndarray:
        """What to try in place of an unreadable sample, after `attempt` others: never a held-out one."""
        return substitutes(self.seed, positions, attempt, range(self.samples))

    def stretch(self, position: int) -> int:
        """Counts quarters of windows: the shards ahead are another list in each."""
        return position // max(1, self.window * self.streams // _LOOKS)

    def shards_ahead(self, position: int, rank: int, world_size: int) -> list[int]:
        """The shards of this window and the next in each stream that the rank reads; of all streams where the world divides none."""
        mine = range(rank, self.streams, world_size) if self.streams % world_size == 0 else range(self.streams)
        epoch, p = divmod(position, self.samples)
        window = p // self.streams // self.window
        found = [shard for step in (0, 1) for stream in mine for shard in self._shards_of(epoch, stream, window + step)]
        return list(dict.fromkeys(found))

    def _shards_of(self, epoch: int, stream: int, window: int) -> list[int]:
        """The shards that one window of a stream reads; those of the next epoch's first behind the last."""
        first = self._stream_start(stream) + window * self.window
        stop = min(first + self.window, self._stream_start(stream + 1))
        if first >= stop:
            return self._shards_of(epoch + 1, stream, 0) if window else []
        shards, ends = self._shard_order(epoch)
        low, high = np.searchsorted(ends, [first, stop - 1], side="right")
        return shards[low : high + 1].tolist()

    def _shuffle_window(self, epoch: int, stream: int, window: int) -> np.ndarray:
        """The sample_ids of one window of a stream, shuffled."""
        first = self._stream_start(stream) + window * self.window
        stop = min(first + self.window, self._stream_start(stream + 1))
        # Block 0 of an epoch orders its shards; its windows are the blocks after it.
        block = 1 + stream * -(-self.samples // self.window) + window
        return self._sequence(epoch, first + permutation(stop - first, self.seed, epoch, block))

    def _stream_start(self, stream: int) -> int:
        """Where stream s begins in the epoch's sequence: the sum of ceil((N - i) / S) over i < s."""
        whole, rest = divmod(self.samples, self.streams)
        return stream * whole + min(stream, rest)

    def _sequence(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The sample_ids at these places of the epoch's joined shards."""
        shards, ends = self._shard_order(epoch)
        number = np.searchsorted(ends, places, side="right")
        return self._starts[shards[number]] + places - (ends[number] - self._counts[shards[number]])

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = permutation(len(self._counts), self.seed, epoch)
        return shards, np.cumsum(self._counts[shards])


class HeldOut:
    """The last `held_out` of `samples`, in order and again from the start: what Order leaves out. `seed` keys substitutes."""

    def __init__(self, samples: int, held_out: int, seed: int = 0):
        if not 0 < held_out <= samples:
            raise ValueError(f"held_out must lie in 1 .. {samples}; got {held_out}")
        self.samples = held_out
        self.seed = seed
        self._first = samples - held_out

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """The sample_id of each position: int64 [n] -> int64 [n]."""
        return self._first + np.asarray(positions, np.int64) % self.samples

    def substitutes(self, positions: np.ndarray, attempt: int) -> np.ndarray:
        """What to try in place of an unreadable sample: another held-out one."""
        return substitutes(self.seed, positions, attempt, range(self._first, self._first + self.samples))

    def stretch(self, position: int) -> int:
        """Held-out samples are few: nothing is fetched ahead for them."""
        return 0

    def shards_ahead(self, position: int, rank: int, world_size: int) -> list[int]:
        return []
