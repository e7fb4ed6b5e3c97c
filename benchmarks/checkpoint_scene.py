"""A checkpoint to be broken, what may follow from it, and its digests made right again.

What was done to a checkpoint says what may follow:

    damage      bytes differ from what was saved: it must be noticed, or what is read must be what was saved
    nonsense    contents that contradict each other or the format, digests made right again: it must be noticed
    unfinished  a save that was cut off, and then damaged: as damage, but nothing need be told, since it was never committed
    escape      it points at a file outside its folder: it must be noticed
    forgery     another consistent content with the right digests: nothing can notice it, but nothing may break
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

DAMAGE, UNFINISHED, NONSENSE, ESCAPE, FORGERY = "damage", "unfinished", "nonsense", "escape", "forgery"


class Scene(NamedTuple):
    """A checkpoint to be broken: its folder, and folders of an older one of its run and of another run's."""

    folder: Path
    older: Path
    stranger: Path

    def shares(self) -> list[Path]:
        """The ranks' files."""
        return sorted(self.folder.glob("rank-*.safetensors"))


def sealed(raw: dict[str, Any]) -> str:
    """JSON with its own digest, as a manifest has it."""
    return json.dumps({**raw, "xxh3": xxhash.xxh3_128_hexdigest(json.dumps(raw, sort_keys=True).encode())})


def reseal(scene: Scene, change: Callable[[Any], object], kind: str = NONSENSE) -> str:
    """Changes the manifest and makes every digest right again."""
    path = scene.folder / "manifest.json"
    raw = json.loads(path.read_text())
    del raw["xxh3"]
    for share in scene.shares():
        content = share.read_bytes()
        raw["files"][share.name] = {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    change(raw)
    path.write_text(sealed(raw))
    return kind


def reheader(chance: random.Random, scene: Scene, change: Callable[[dict[str, Any]], object]) -> str:
    """Changes the header of one share, and makes every digest right again."""
    path = chance.choice(scene.shares())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    path.write_bytes(sized(json.dumps(header).encode()) + content[8 + length :])
    return reseal(scene, lambda raw: None)


def sized(header: bytes) -> bytes:
    """A header behind its length, as safetensors has it."""
    return len(header).to_bytes(8, "little") + header
