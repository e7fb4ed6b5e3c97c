"""A set of shards, prepared or made elsewhere: samples by their ids, whole batches at a time, with what of them could not be read."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from fasttrain.data.arrays import REMEDY, ArrayReader
from fasttrain.data.columns import read_column
from fasttrain.data.config import DataConfig
from fasttrain.data.damage import Damage
from fasttrain.data.files import LocalFiles, ShardFiles
from fasttrain.data.foreign.opening import open_foreign
from fasttrain.data.foreign.pattern import pattern_of
from fasttrain.data.index import (
    CAPTIONS_FILE,
    DIGESTS_FILE,
    FACTS_FILE,
    INDEX_FILE,
    LABELS_FILE,
    Index,
    index_of,
    read_index,
)
from fasttrain.data.remote.store import open_files
from fasttrain.data.substitutes import Gathered


class Reader(Protocol):
    """Reads rows of one shard."""

    def read(self, number: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Shard and rows [n] -> arrays [n, *shape], and which could be read, bool [n]; None means all."""
        ...


class ShardSet:
    """A set of shards, addressed by sample_id: 0 .. samples - 1, shard after shard. Any number of threads may gather at once.

    Args:
        files: where the shards are.
        index: what they hold.
        labels: int64 [samples].
        reader: of their rows.
        damage: what was found unreadable.
        read_facts: gives what was recorded of the samples when it is wanted, float32 [samples, F], in the order of `index.facts`.
    """

    def __init__(
        self, files: ShardFiles, index: Index, labels: np.ndarray, reader: Reader, damage: Damage, read_facts: Callable[[], np.ndarray]
    ):
        self.files, self.index, self.labels, self.damage = files, index, labels, damage
        self._reader, self._read_facts = reader, read_facts
        self._first = np.concatenate([[0], np.cumsum(index.shard_samples)])

    @classmethod
    def open(cls, place: str | Path, config: DataConfig | None = None, alive: Callable[[], None] = lambda: None) -> "ShardSet":
        """The set of shards at a place.

        Args:
            place: a folder that `fasttrain prepare` wrote, or its URL, or a pattern or folder of WebDataset shards made elsewhere.
            config: how to read it; its `train` is not looked at.
            alive: called now and then while shards are indexed, which may take long the first time.

        Raises:
            UserError: no such place, index, labels or digests there; another format; more damage than may be.
        """
        config = config or DataConfig(train=str(place))
        pattern = pattern_of(str(place))
        if pattern is None:
            return cls._prepared(place, config)
        files, index, labels, reader, damage, facts = open_foreign(pattern, config, alive)
        return cls(files, index, labels, reader, damage, lambda: facts)

    @classmethod
    def _prepared(cls, place: str | Path, config: DataConfig) -> "ShardSet":
        files = open_files(str(place), config, (INDEX_FILE, LABELS_FILE, DIGESTS_FILE, FACTS_FILE, CAPTIONS_FILE))
        index = read_index(files.folder) if isinstance(files, LocalFiles) else index_of(files)
        labels = read_column(files, LABELS_FILE, index.labels_xxh3, np.int64, (index.samples,))
        digests = read_column(files, DIGESTS_FILE, index.digests_xxh3, np.uint64, (index.samples,))
        damage = Damage(files.place, index.samples, config.max_damaged, REMEDY)
        reader = ArrayReader(files, index, digests, config.verify, config.retry_seconds, damage)
        reader.look()
        return cls(files, index, labels, reader, damage, partial(_read_facts, files, index))

    def __len__(self) -> int:
        return self.index.samples

    def gather(self, sample_ids: np.ndarray) -> Gathered:
        """The samples of these ids, in their order, all in new memory; what cannot be read is zeros, and said to be so.

        Args:
            sample_ids: int64 [n], in [0, samples).

        Raises:
            IndexError: an id outside the set.
            UserError: more of the set is unreadable than may be, or a passing failure lasted too long.
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.index.samples):
            raise IndexError(f"sample ids must lie in [0, {self.index.samples}); got {ids.min()} to {ids.max()}")
        out = np.empty((len(ids), *self.index.shape), self.index.dtype)
        readable = np.ones(len(ids), bool)
        number = np.searchsorted(self._first, ids, side="right") - 1
        rows = ids - self._first[number]
        by_shard = np.argsort(number, kind="stable")
        starts = np.flatnonzero(np.diff(number[by_shard], prepend=-1))
        for start, stop in pairwise([*starts, len(ids)]):
            places = by_shard[start:stop]
            out[places], good = self._reader.read(int(number[places[0]]), rows[places])
            if good is not None:
                readable[places] = good
        return Gathered(out, self.labels[ids], readable)

    def facts(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """What was recorded of all samples, by name: float32 [samples] each, read and verified now.

        Raises:
            UserError: facts.npy is missing or damaged.
        """
        recorded = self._read_facts() if names else None
        return {} if recorded is None else {name: recorded[:, self.index.facts.index(name)] for name in names}

    def spans(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """The first sample_id of each of these shards, and the one behind its last."""
        return [(int(self._first[number]), int(self._first[number + 1])) for number in numbers]

    def ahead(self, numbers: Sequence[int]) -> None:
        """Says which shards are wanted next, most urgent first; returns at once."""
        self.files.ahead([self.index.shards[number].file for number in numbers])

    def close(self) -> None:
        """Ends what fetches ahead."""
        self.files.close()


def _read_facts(files: ShardFiles, index: Index) -> np.ndarray:
    if index.facts_xxh3 is None:
        return np.empty((index.samples, 0), np.float32)
    return read_column(files, FACTS_FILE, index.facts_xxh3, np.float32, (index.samples, len(index.facts)))
