"""Broken checkpoints: accidents of bytes, and nonsense that bears the right digests; each a function of (seed, number)."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_scene import DAMAGE, ESCAPE, FORGERY, NONSENSE, UNFINISHED, Scene, reheader, reseal, sealed, sized

CANARY = "canary"
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2.5, 10**9, 2**63, 10**30, -(2**70), 1e308),
    *("", "x", "..", "6", "x" * 10_000, "a\0b", [], {}, [[]], [None], [-1], {"a": 1}, [2**62, 2**62], {"": {}}),
)


class _Pickled:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {CANARY}",)


def break_checkpoint(scene: Scene, seed: int, number: int) -> tuple[str, str]:
    """Breaks it; returns what may follow (the strictest of what was done) and what was done."""
    chance = random.Random(f"{seed}/{number}")
    change = chance.choice(CHANGES)
    kind = change(chance, scene)
    return kind, change.__name__


def flip(chance: random.Random, scene: Scene) -> str:
    """A few single bits of any file."""
    path = chance.choice(sorted(scene.folder.iterdir()))
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 1, 10))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return DAMAGE


def flip_in_header(chance: random.Random, scene: Scene) -> str:
    """A bit of what the file says of itself."""
    path = chance.choice(scene.shares())
    content = bytearray(path.read_bytes())
    content[chance.randrange(600)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return DAMAGE


def truncate(chance: random.Random, scene: Scene) -> str:
    """A file cut short, to nothing at times."""
    path = chance.choice(sorted(scene.folder.iterdir()))
    os.truncate(path, chance.choice((0, 4, 8, 9, chance.randrange(path.stat().st_size))))
    return DAMAGE


def zero_block(chance: random.Random, scene: Scene) -> str:
    """A block never written: zeros of the right length."""
    path = chance.choice(scene.shares())
    content = bytearray(path.read_bytes())
    at, length = chance.randrange(len(content)), chance.choice((1, 512, 4096))
    content[at : at + length] = bytes(len(content[at : at + length]))
    path.write_bytes(content)
    return DAMAGE


def append(chance: random.Random, scene: Scene) -> str:
    """Bytes too many."""
    path = chance.choice(sorted(scene.folder.iterdir()))
    path.write_bytes(path.read_bytes() + chance.choice((b"\0", b"{}", chance.randbytes(100))))
    return DAMAGE


def exchange(chance: random.Random, scene: Scene) -> str:
    """The ranks' files under each other's names."""
    one, other = scene.shares()[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return DAMAGE


def from_elsewhere(chance: random.Random, scene: Scene) -> str:
    """A file of an older checkpoint, or of another run's."""
    path = chance.choice(sorted(scene.folder.iterdir()))
    source = chance.choice((scene.older, scene.stranger)) / path.name
    if source.exists():
        shutil.copy(source, path)
    return DAMAGE


def lose(chance: random.Random, scene: Scene) -> str:
    """A file that is gone, or no file any more."""
    path = chance.choice(sorted(scene.folder.iterdir()))
    path.unlink()
    what = chance.randrange(5)
    if what == 1:
        path.mkdir()
    elif what == 2:
        os.mkfifo(path)
    elif what == 3:
        path.symlink_to(path)
    elif what == 4:
        path.symlink_to("/dev/zero")
    return DAMAGE


def link_out(chance: random.Random, scene: Scene) -> str:
    """The right content, but in a file outside, behind a link."""
    path = chance.choice(sorted(scene.folder.iterdir()))
    outside = scene.folder.parents[2] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    return ESCAPE


def pickled(chance: random.Random, scene: Scene) -> str:
    """A pickle that calls itself a share, digest and all."""
    chance.choice(scene.shares()).write_bytes(pickle.dumps({"weights": _Pickled()}))
    reseal(scene, lambda raw: None)
    return NONSENSE


def edit_value(chance: random.Random, scene: Scene) -> str:
    """Any value of the manifest, of any type."""
    return reseal(scene, lambda raw: _set(chance, raw, chance.choice(_VALUES)), FORGERY)


def drop_key(chance: random.Random, scene: Scene) -> str:
    """A key less."""

    def drop(raw: Any) -> None:
        section, key = _place(chance, raw)
        del section[key]

    return reseal(scene, drop, FORGERY)


def add_key(chance: random.Random, scene: Scene) -> str:
    """A key too many."""
    return reseal(scene, lambda raw: raw.update({chance.choice(("extra", "Files", "")): chance.choice(_VALUES)}), NONSENSE)


def point_outside(chance: random.Random, scene: Scene) -> str:
    """A file's name that leads out of the folder, to one with the right content."""
    share = chance.choice(scene.shares())
    outside = scene.folder.parents[2] / "outside.safetensors"
    shutil.copy(share, outside)
    names = (f"../../../{outside.name}", str(outside), f"./{share.name}", f"x/../{share.name}", f"{share.name}/", f"\0{share.name}")

    def point(raw: Any) -> None:
        raw["files"][chance.choice(names)] = raw["files"].pop(share.name)

    return reseal(scene, point, ESCAPE)


def misshape(chance: random.Random, scene: Scene) -> str:
    """A parameter of another shape: turned round, larger, negative, deeper."""

    def change(raw: Any) -> None:
        name = chance.choice(sorted(raw["shapes"]))
        shape = raw["shapes"][name]
        others: list[Any] = [[*shape, 2], [-n for n in shape], [0], [2**40] * 3, [shape], shape[:-1], [shape[0] + 1, *shape[1:]]]
        if sorted(set(shape)) != sorted(shape) or len(shape) < 2:
            others.append([1, *shape])
        else:
            others.append(shape[::-1])
        raw["shapes"][name] = chance.choice(others)

    return reseal(scene, change, NONSENSE)


def rename_state(chance: random.Random, scene: Scene) -> str:
    """States or parameters under other names, more of them, or fewer."""

    def change(raw: Any) -> None:
        what = chance.randrange(4)
        if what == 0:
            raw["states"].append(chance.choice(("ema_1", "", "../x")))
        elif what == 1:
            raw["states"].pop()
        elif what == 2:
            name = chance.choice(sorted(raw["shapes"]))
            raw["shapes"][chance.choice(("other", "", name + "|", "a|b|0"))] = raw["shapes"].pop(name)
        else:
            del raw["shapes"][chance.choice(sorted(raw["shapes"]))]

    return reseal(scene, change, NONSENSE)


def edit_header(chance: random.Random, scene: Scene) -> str:
    """A slice's own entry: type, shape, place, or name."""
    values: tuple[Any, ...] = ("F16", "I32", "BF16", "BOOL", "X", [1], [2, 2], [-4], [2**62], [0, 2**63], [4, 0], [0, 0], None, {}, 5)

    def change(header: dict[str, Any]) -> None:
        name = chance.choice(sorted(header))
        header[name][chance.choice(("dtype", "shape", "data_offsets"))] = chance.choice(values)

    return reheader(chance, scene, change)


def rename_slice(chance: random.Random, scene: Scene) -> str:
    """A slice of another parameter, state or start, or with no such parts at all."""

    def change(header: dict[str, Any]) -> None:
        name = chance.choice(sorted(header))
        parameter, state, start = name.rsplit("|", 2)
        starts = ("-1", "x", "", "1e3", "٣", " 0", "+0", str(10**30), str(int(start) + 1), "0x0")
        names = [
            f"{parameter}|{state}|{chance.choice(starts)}",
            f"{parameter}|other|{start}",
            f"other|{state}|{start}",
            parameter,
            "",
            "|||",
        ]
        header[chance.choice(names)] = header.pop(name)

    return reheader(chance, scene, change)


def overlap(chance: random.Random, scene: Scene) -> str:
    """A slice twice, at a start that others cover, or none at all."""

    def change(header: dict[str, Any]) -> None:
        name = chance.choice(sorted(header))
        parameter, state, start = name.rsplit("|", 2)
        if chance.random() < 0.5:
            del header[name]
        else:
            header[f"{parameter}|{state}|{int(start) + chance.choice((1, 3, 10**9))}"] = header[name]

    return reheader(chance, scene, change)


def wild_header(chance: random.Random, scene: Scene) -> str:
    """A header of impossible length, of no JSON, nested without end, or with a name twice."""
    path = chance.choice(scene.shares())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    twice = sized(b"{" + header[1:].rstrip()[:-1] + b"," + header[1:].rstrip()[:-1] + b"}")
    wild = chance.choice(
        (
            (2**63).to_bytes(8, "little") + header,
            (length + 10**7).to_bytes(8, "little") + header,
            (0).to_bytes(8, "little") + header,
            sized(b"[" * 100_000),
            sized(b'{"a":' * 50_000),
            sized(b"\xff\xfe" * 50),
            twice,
            sized(header.replace(b"F32", b"F64", 1)),
            sized(b'{"__metadata__":{"a":1},' + header[1:]),
        )
    )
    path.write_bytes(wild + data)
    reseal(scene, lambda raw: None)
    return FORGERY if wild is twice else NONSENSE  # the same twice is as good as once


def swap_slices(chance: random.Random, scene: Scene) -> str:
    """Two slices of one size under each other's names, digests right: a forgery."""

    def change(header: dict[str, Any]) -> None:
        by_shape: dict[int, list[str]] = {}
        for name, entry in header.items():
            by_shape.setdefault(entry["shape"][0], []).append(name)
        one, other = chance.sample(chance.choice([names for names in by_shape.values() if len(names) > 1]), 2)
        header[one], header[other] = header[other], header[one]

    reheader(chance, scene, change)
    return FORGERY


def stray_folder(chance: random.Random, scene: Scene) -> str:
    """Beside the checkpoint, names that look like a newer one."""
    parent = scene.folder.parent
    name = chance.choice(
        ("step-00000009", "step-99999999999999999999", "step--0000001", "step-", "step-0000000x", "step-00000009.tmp", "latest")
    )
    what = chance.randrange(4)
    path = parent / name
    if path.exists():
        path.unlink()
    if what == 0:
        path.mkdir()
    elif what == 1:
        path.write_bytes(chance.randbytes(20))
    elif what == 2:
        path.symlink_to(chance.choice((scene.stranger, path, Path("/proc"))))
    else:
        shutil.copytree(scene.folder, path)
    return DAMAGE


def cut_off(chance: random.Random, scene: Scene) -> str:
    """As a save leaves it that was killed before its commit, and then damaged: a plan, shares, receipts."""
    raw = json.loads((scene.folder / "manifest.json").read_text())
    files = raw.pop("files")
    partial = scene.folder.with_suffix(".tmp")
    os.rename(scene.folder, partial)
    (partial / "manifest.json").unlink()
    (partial / "plan.json").write_text(sealed(raw))
    for name, share in files.items():
        (partial / name).with_suffix(".json").write_text(sealed({"share": share}))
    damaged = scene._replace(folder=partial)
    chance.choice((flip, truncate, append, lose, zero_block, from_elsewhere, exchange))(chance, damaged)
    return UNFINISHED


CHANGES: tuple[Callable[[random.Random, Scene], str], ...] = (
    *(flip, flip, flip_in_header, truncate, zero_block, append, exchange, from_elsewhere, lose, link_out, pickled),
    *(edit_value, edit_value, edit_value, drop_key, add_key, point_outside, misshape, misshape, rename_state),
    *(edit_header, edit_header, rename_slice, rename_slice, overlap, wild_header, wild_header, swap_slices, stray_folder, cut_off, cut_off),
)


def _place(chance: random.Random, raw: Any) -> tuple[Any, Any]:
    """Any key of the manifest, at any depth."""
    section, key = raw, chance.choice(sorted(raw))
    while isinstance(section[key], dict | list) and section[key] and chance.random() < 0.8:
        section = section[key]
        key = chance.choice(sorted(section)) if isinstance(section, dict) else chance.randrange(len(section))
    return section, key


def _set(chance: random.Random, raw: Any, value: Any) -> None:
    section, key = _place(chance, raw)
    section[key] = value
