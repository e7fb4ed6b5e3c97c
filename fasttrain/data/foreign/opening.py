"""Shards made elsewhere as a set like any other: indexed at first use, with the same index as a prepared one."""

import fnmatch
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from fasttrain.data.config import DataConfig
from fasttrain.data.damage import Damage
from fasttrain.data.facts import RECORDED
from fasttrain.data.files import LocalFiles, ShardFiles
from fasttrain.data.foreign.indexing import first_listing, index_folder, index_shards
from fasttrain.data.foreign.parts import Part
from fasttrain.data.foreign.pattern import Pattern
from fasttrain.data.foreign.reader import MemberReader
from fasttrain.data.index import FORMAT, Index, Shard, Source
from fasttrain.data.prepare.pixels import centre_facts
from fasttrain.data.remote.addresses import shown
from fasttrain.data.remote.store import cache_folder, open_files
from fasttrain.errors import UserError

_LOG = logging.getLogger(__name__)
_UNLABELLED = "samples without a label, where others have one"
_NAMED = 5


class Foreign(NamedTuple):
    """What was found of a set: where it is, its shards' parts by name, whether it has classes, and the folder of its index."""

    files: ShardFiles
    parts: dict[str, Part]
    labelled: bool
    folder: Path

    @property
    def name(self) -> str:
        """What the set is called."""
        return self.files.place.rpartition("/")[2] or "shards"

    @property
    def labels(self) -> np.ndarray:
        """int64 [samples]."""
        columns = [part.samples[:, 3] for part in self.parts.values()]
        return np.ascontiguousarray(np.concatenate(columns)) if self.labelled else np.zeros(sum(map(len, columns)), np.int64)

    @property
    def classes(self) -> tuple[str, ...]:
        """Numbers, for want of names."""
        return tuple(map(str, range(int(self.labels.max()) + 1))) if self.labelled else ()

    @property
    def digests_xxh3(self) -> str:
        """Digest of all images' digests, in their order: which samples these are."""
        return xxhash.xxh3_128_hexdigest(np.concatenate([part.image_digests for part in self.parts.values()]).tobytes())

    @property
    def labels_xxh3(self) -> str:
        """Digest of the labels."""
        return xxhash.xxh3_128_hexdigest(self.labels.tobytes())

    @property
    def captions_xxh3(self) -> str | None:
        """Digest of what the captions stand in, in its order; None where no sample has a txt or json."""
        digests = np.concatenate([part.digests[:, 2] for part in self.parts.values()])
        return xxhash.xxh3_128_hexdigest(digests.tobytes()) if digests.any() else None


def open_parts(pattern: Pattern, config: DataConfig, alive: Callable[[], None]) -> Foreign:
    """The shards that a pattern names, indexed, at whatever size they are to be seen.

    Args:
        pattern: its shards.
        config: the `data:` section.
        alive: called now and then while shards are indexed.

    Raises:
        UserError: no sample, more missing or lost than data.max_damaged allows, or a store that fails for too long.
    """
    files = open_files(pattern.base, config)
    folder = index_folder(cache_folder(config), pattern)
    pattern = first_listing(pattern, folder)
    found = index_shards(files, pattern, folder, config.retry_seconds, alive)
    present = {name: part for name, part in zip(pattern.names, found, strict=True) if part is not None}
    labelled = any(part.labelled for part in present.values())
    parts = {name: part.without_unlabelled(_UNLABELLED) if labelled else part for name, part in present.items()}
    missing = [name for name in dict.fromkeys([*pattern.names, *_named_beside(files, pattern)]) if name not in parts]
    _tell(files, parts, missing)
    _check(files, parts, missing, config.max_damaged, folder)
    return Foreign(files, parts, labelled, folder)


def open_foreign(
    pattern: Pattern, config: DataConfig, alive: Callable[[], None]
) -> tuple[ShardFiles, Index, np.ndarray, MemberReader, Damage, np.ndarray]:
    """The set that a pattern names: its files, index, labels, reader, damage and facts.

    Args:
        pattern: its shards.
        config: the `data:` section.
        alive: called now and then while shards are indexed.

    Raises:
        UserError: data.size is missing, or as open_parts.
    """
    if config.size is None:
        told = f"data.size is missing: images of {_place(pattern)} are cropped and resized to it"
        raise UserError(f"{told}; give it in pixels (`fasttrain evaluate` takes --size)")
    found = open_parts(pattern, config, alive)
    files, parts = found.files, found.parts
    labels = found.labels
    facts = _facts(np.concatenate([part.samples[:, 6:8] for part in parts.values()]), config.size)
    index = _index(found, labels, facts, config.size)
    remedy = f"restore the shards; if they were made anew, delete {found.folder} to index them again"
    damage = Damage(files.place, index.samples, config.max_damaged, remedy)
    reader = MemberReader(files, list(parts), list(parts.values()), config.size, config.verify, config.retry_seconds, damage)
    reader.look()
    return files, index, labels, reader, damage, facts


def _index(found: Foreign, labels: np.ndarray, facts: np.ndarray, size: int) -> Index:
    shards = tuple(
        Shard(file=name, samples=len(part.samples), bytes=part.bytes, xxh3=part.xxh3, offset=0, stride=0)
        for name, part in found.parts.items()
    )
    return Index(
        format=FORMAT,
        layout="members",
        kind="image",
        samples=len(labels),
        rejected=sum(part.lost.total() for part in found.parts.values()),
        shape=(3, size, size),
        dtype="uint8",
        classes=found.classes,
        num_classes=len(found.classes),
        source=Source(name=found.name, xxh3=xxhash.xxh3_128_hexdigest("".join(s.xxh3 for s in shards).encode())),
        labels_xxh3=found.labels_xxh3,
        digests_xxh3=found.digests_xxh3,
        captions_xxh3=found.captions_xxh3,
        pixels=size,
        facts=RECORDED,
        facts_xxh3=xxhash.xxh3_128_hexdigest(facts.tobytes()),
        shards=shards,
    )


def _facts(dimensions: np.ndarray, size: int) -> np.ndarray:
    """Heights and widths [n, 2] -> what `prepare images` would record of these images, float32 [n, F]; where unknown, zeros."""
    known, which = np.unique(dimensions, axis=0, return_inverse=True)
    facts = [centre_facts(width, height, size) if height and width else (0.0,) * len(RECORDED) for height, width in known.tolist()]
    return np.array(facts, np.float32).reshape(-1, len(RECORDED))[which.reshape(-1)]


def _check(files: ShardFiles, parts: dict[str, Part], missing: list[str], most: float, folder: Path) -> None:
    """Refuses a set with nothing in it, or with more missing than a run may lose."""
    samples = sum(len(part.samples) for part in parts.values())
    lost = Counter[str]()
    for part in parts.values():
        lost += part.lost
    why = ", ".join(f"{count} {reason}" for reason, count in lost.most_common(_NAMED))
    remedy = f"restore the shards and delete {folder} to index them again, or raise data.max_damaged"
    if len(missing) > most * (len(parts) + len(missing)):
        raise UserError(f"{files.place}: {len(missing)} of {len(parts) + len(missing)} shards are missing ({_named(missing)}); {remedy}")
    if not samples:
        faults = Counter(fault for part in parts.values() for fault in part.faults)
        told = ", ".join(f"{fault} ({count})" for fault, count in faults.most_common(_NAMED))
        raise UserError(f"{files.place}: not one sample in {len(parts)} shards: {why or told or 'no image members'}; {remedy}")
    if lost.total() > most * (samples + lost.total()):
        raise UserError(f"{files.place}: {lost.total()} of {samples + lost.total()} samples cannot be used: {why}; {remedy}")


def _tell(files: ShardFiles, parts: dict[str, Part], missing: list[str]) -> None:
    """What was found wrong when the shards were indexed: a line a shard, and one for what is not used. Every start tells it, on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    if missing:
        _LOG.warning("%s: %d shards are missing: %s", files.place, len(missing), _named(missing))
    for name, part in parts.items():
        lost = [f"{count} {reason}" for reason, count in (part.lost + part.refused).most_common(_NAMED)]
        faults = [f"{fault}{f' ({count} times)' if count > 1 else ''}" for fault, count in Counter(part.faults).most_common(_NAMED)]
        if lost or faults:
            _LOG.warning("%s/%s: %s; left out", files.place, name, "; ".join([*faults, *lost]))
        wanted = _expected(files, name)
        if wanted is not None and wanted != len(part.samples):
            _LOG.warning("%s/%s: holds %d samples that can be used, where its maker wrote %d", files.place, name, len(part.samples), wanted)
    unused = Counter[str]()
    for part in parts.values():
        unused += part.unused
    if unused:
        told = ", ".join(f"{ending} ({count})" for ending, count in unused.most_common(_NAMED))
        _LOG.warning("%s: members not used, and never opened: %s", files.place, told)


def _expected(files: ShardFiles, name: str) -> int | None:
    """What the shards' maker wrote beside them: img2dataset's NAME_stats.json, or a sizes.json."""
    if not isinstance(files, LocalFiles):
        return None
    for file, key in ((f"{name.removesuffix('.tar')}_stats.json", "successes"), ("sizes.json", name)):
        try:
            count = json.loads((files.folder / file).read_bytes())[key]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(count) is int:
            return count
    return None


def _named_beside(files: ShardFiles, pattern: Pattern) -> list[str]:
    """The shards that a sizes.json in a listed folder names: without it nobody knows of one that is gone."""
    if pattern.listed is None or not isinstance(files, LocalFiles):
        return []
    try:
        sizes = json.loads((files.folder / "sizes.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in sizes if fnmatch.fnmatchcase(name, pattern.listed)] if isinstance(sizes, dict) else []


def _named(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


def _place(pattern: Pattern) -> str:
    return f"{shown(pattern.base)} ({len(pattern.names)} shards)"
