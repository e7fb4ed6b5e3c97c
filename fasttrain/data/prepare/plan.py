"""What a set of shards is to be: all that decides its bytes, written into the folder first, so that no two sets mix in one."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from fasttrain.data.index import FORMAT, Source, VaeRecord
from fasttrain.data.order import permutation
from fasttrain.data.prepare.writer import RECEIPTS, TEMPORARY, space_error, stride_of, write_whole
from fasttrain.errors import UserError

T = TypeVar("T")
PLAN_FILE = "plan.json"
_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Plan(Generic[T]):
    """A set: its entries, what becomes of them, and how they are cut into shards.

    settings: whatever else decides the bytes (crop size, batch ...), by the name of its option. facts: what is recorded of each entry.
    pixels: side of the square image before an autoencoder; None: the samples' own. captions: whether entries have some.
    """

    kind: Literal["image", "latent"]
    shape: tuple[int, ...]
    dtype: str
    classes: tuple[str, ...]
    source: Source
    entries: Sequence[T]
    shard_size: int
    vae: VaeRecord | None = None
    facts: tuple[str, ...] = ()
    pixels: int | None = None
    captions: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        """As few as hold shard_size entries at most."""
        return -(-len(self.entries) // self.shard_size)

    @property
    def stride(self) -> int:
        """Bytes that a sample takes in its shard."""
        return stride_of(math.prod(self.shape) * np.dtype(self.dtype).itemsize)

    @cached_property
    def _shuffled(self) -> np.ndarray:
        return permutation(len(self.entries), _SHUFFLE_SEED)

    def chunk(self, number: int) -> range:
        """The places of a shard's entries in the shuffled source: equal counts to within one."""
        first, stop = (len(self.entries) * n // self.num_shards for n in (number, number + 1))
        return range(first, stop)

    def entries_of(self, number: int) -> list[T]:
        """A shard's entries."""
        chunk = self.chunk(number)
        return [self.entries[i] for i in self._shuffled[chunk.start : chunk.stop]]

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes, as plain JSON."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "num_classes": len(self.classes),
            "source": self.source.xxh3,
            "entries": len(self.entries),
            "shard_size": self.shard_size,
            "vae": self.vae.model_dump() if self.vae else None,
            "facts": list(self.facts),
            "captions": self.captions,
            **self.settings,
        }


class Identified(Protocol):
    """Anything that is made into a folder of its own, to go on with later."""

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes, as plain JSON."""
        ...


def claim(out: Path, plan: Identified) -> None:
    """Makes the folder and writes the plan into it, or finds the same plan there.

    Raises:
        UserError: a file in the way, other files in the folder, or another set's plan.
    """
    try:
        (out / RECEIPTS).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{out}: a file is in the way; give a folder") from None
    # Listed before the plan is looked for: another rank's shards appear only after its plan.
    foreign = sorted(p.name for p in out.iterdir() if p.name != RECEIPTS and not p.name.endswith(TEMPORARY))
    path = out / RECEIPTS / PLAN_FILE
    wanted = plan.identity()
    if path.is_file():
        _compare(out, path, wanted)
    elif foreign:
        (out / RECEIPTS).rmdir()
        raise UserError(f"{out}: holds other files ({', '.join(foreign[:3])} ...) and no set of shards; give an empty or a new folder")
    else:
        try:
            write_whole(path, json.dumps(wanted, indent=1).encode())
        except OSError as error:
            raise space_error(error, path) from None


def _compare(out: Path, path: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path}: damaged; delete {out} and prepare the set again") from None
    keys = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if keys:
        told = "; ".join(f"{key} {found.get(key)!r} there, {wanted.get(key)!r} asked for" for key in keys)
        raise UserError(f"{out}: already holds a different set ({told}); give another folder, or delete this one")
