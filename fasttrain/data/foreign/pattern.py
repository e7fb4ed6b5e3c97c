"""Which shards a config means: `FOLDER/train-{000000..000127}.tar`, `FOLDER/*.tar`, one tar, or a folder of tars without an index."""

import fnmatch
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fasttrain.data.index import INDEX_FILE
from fasttrain.data.remote.addresses import PIPE, scheme_of, shown
from fasttrain.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
_NAME = re.compile(r"[A-Za-z0-9_][^/\\\x00-\x1f]*")
_MOST_SHARDS = 1_000_000


class Pattern(NamedTuple):
    """The folder or address up to the files' names, and these; `listed` is the glob that found them in a folder, where one did."""

    base: str
    names: tuple[str, ...]
    listed: str | None = None


def pattern_of(place: str) -> Pattern | None:
    """What a place names of shards made elsewhere; None where it is a prepared folder, or nothing that we know.

    Raises:
        UserError: braces that cannot be read, or a pattern that names no file.
    """
    scheme = scheme_of(place)
    if scheme is None and Path(place).is_dir():
        return _folder(Path(place))
    path, mark, query = place.partition("?") if scheme not in (None, PIPE) else (place, "", "")
    if not any(letter in path for letter in "{*") and not path.endswith(".tar"):
        return None
    head = path.partition("{")[0]
    folder, slash, _ = head.rpartition("/")
    file = path[len(folder) + len(slash) :]
    base = f"{folder}{slash}" if scheme == PIPE or folder in ("", "/") else folder
    names = tuple(itertools.islice(_expanded(file, place), _MOST_SHARDS + 1))
    if "*" in file:
        names = _globbed(scheme, folder or slash or ".", names, place)
    _check(names, place)
    return Pattern(f"{base or '.'}{mark}{query}", names, file if "*" in file else None)


def _folder(folder: Path) -> Pattern | None:
    """A folder of tars that `fasttrain prepare` has not begun."""
    if (folder / INDEX_FILE).exists() or (folder / "receipts").exists():
        return None
    names = tuple(sorted(path.name for path in folder.glob("*.tar")))
    if not names:
        return None
    _check(names, str(folder))
    return Pattern(str(folder), names, "*.tar")


def _globbed(scheme: str | None, folder: str, patterns: tuple[str, ...], place: str) -> tuple[str, ...]:
    if scheme is not None:
        raise UserError(f"data.train: {shown(place)}: a store's files cannot be listed; write {{000000..000127}} instead of *")
    here = sorted(path.name for path in Path(folder).glob("*")) if Path(folder).is_dir() else []
    names = tuple(name for name in here if any(fnmatch.fnmatchcase(name, each) for each in patterns))
    if not names:
        raise UserError(f"data.train: {place}: no file there has such a name")
    return names


def _expanded(text: str, place: str) -> Iterator[str]:
    """Every text that the braces stand for, the last ones changing fastest."""
    parts = _BRACES.split(text)
    if any("{" in part or "}" in part for part in parts):
        raise UserError(f"data.train: {shown(place)}: braces within braces or left open; write {{000000..000127}} or {{a,b}}")
    choices = [_choices(part, place) if i % 2 else [part] for i, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _choices(inside: str, place: str) -> list[str]:
    found = _RANGE.fullmatch(inside)
    if found is None:
        return inside.split(",")
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < _MOST_SHARDS:
        raise UserError(f"data.train: {shown(place)}: {{{inside}}} must count upwards, over {_MOST_SHARDS:,} shards at most")
    return [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]


def _check(names: tuple[str, ...], place: str) -> None:
    if len(names) > _MOST_SHARDS:
        raise UserError(f"data.train: {shown(place)}: names more than {_MOST_SHARDS:,} shards")
    wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
    if wrong is not None:
        raise UserError(f"data.train: {shown(place)}: {wrong!r} is no file name; put * and braces into the last part only")
    if len(set(names)) < len(names):
        raise UserError(f"data.train: {shown(place)}: names a shard twice")
