"""Labelled images by name: a tree of class folders, or a tar of one (also .tar.gz, .tar.bz2, .tar.xz)."""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import xxhash

from fasttrain.data.prepare.pixels import Unreadable
from fasttrain.errors import UserError

_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]


class Entry(NamedTuple):
    """One file of a class: its name below the root, its label, its size, and where it begins in the tar (0 in a tree; -1: no file)."""

    name: str
    label: int
    size: int
    offset: int


@dataclass(frozen=True)
class Listing:
    """What a source holds: files sorted by name, classes sorted by name (their order gives the labels)."""

    name: str
    path: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def xxh3(self) -> str:
        """Digest of the names and sizes: the same for a tree and its tar, wherever they lie."""
        hasher = xxhash.xxh3_128()
        for entry in self.entries:
            hasher.update(f"{entry.name}\0{entry.size}\n".encode())
        return hasher.hexdigest()


def read_entry(path: Path, entry: Entry) -> bytes:
    """The bytes of one file of a source at `path` (a folder or an uncompressed tar).

    Raises:
        Unreadable: a link or special file, without permission, or not of the listed size.
        OSError: the disk or network failed: that is no property of the file, and must stop the run rather than drop samples.
    """
    if entry.offset < 0:
        raise Unreadable("a link or a special file")
    try:
        with (path / entry.name if path.is_dir() else path).open("rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.size)
    except PermissionError:
        raise Unreadable("no permission to read it") from None
    if len(content) != entry.size:
        raise Unreadable(f"{len(content)} of its {entry.size} bytes")
    return content


@contextmanager
def open_source(source: Path, out: Path) -> Iterator[Listing]:
    """The files of a class-folder tree, or of a tar of one, readable inside the context.

    A compressed tar is unpacked to one plain tar in `out`, to be read at random, and removed at the end.

    Raises:
        UserError: nothing there, not a tar, no class folders, no files in them, or no space to unpack.
    """
    fresh = not out.exists()
    scratch = out / f"source.{os.getpid()}.tmp"
    try:
        yield _list(source, scratch)
    finally:
        if out.is_dir():
            scratch.unlink(missing_ok=True)
            if fresh and not any(out.iterdir()):
                out.rmdir()


def _list(source: Path, scratch: Path) -> Listing:
    if source.is_dir():
        path, found = source, _tree_files(source)
    elif source.is_file():
        path = _unpacked(source, scratch)
        found = _without_root(_tar_members(source, path))
    else:
        raise UserError(f"{source}: no such folder or tar of images; give a folder with one sub-folder a class, or a tar of one")
    return _labelled(source, path, found)


def _labelled(source: Path, path: Path, found: Iterable[tuple[str, int, int]]) -> Listing:
    """Class = the first folder of a name. Files outside all class folders and hidden files are no samples."""
    inside = sorted(file for file in found if "/" in file[0] and not PurePosixPath(file[0]).name.startswith("."))
    classes = tuple(sorted({name.partition("/")[0] for name, _, _ in inside}))
    if not inside:
        raise UserError(f"{source}: no class folders with files in them; expected {source.name}/<class>/<image>, one folder a class")
    labels = {name: label for label, name in enumerate(classes)}
    entries = tuple(Entry(name, labels[name.partition("/")[0]], size, offset) for name, size, offset in inside)
    return Listing(source.name, path, classes, entries)


def _tree_files(root: Path) -> Iterable[tuple[str, int, int]]:
    """(name below the root, size, 0) of every file."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(folder, file)
            readable = path.is_file()
            yield path.relative_to(root).as_posix(), path.stat().st_size if readable else 0, 0 if readable else -1


def _tar_members(source: Path, path: Path) -> list[tuple[str, int, int]]:
    """(name, size, offset) of every member that is not a folder."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [m for m in tar if not m.isdir()]
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{source}: not a readable tar ({error}); give a folder of class folders or a tar of one") from None
    return [(str(PurePosixPath(m.name)), m.size, m.offset_data if m.isreg() else -1) for m in members]


def _without_root(files: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Takes away the folders that all files share, as long as class folders remain below them."""
    while len({name.partition("/")[0] for name, _, _ in files}) == 1:
        inner = [(name.partition("/")[2], size, offset) for name, size, offset in files]
        if not any("/" in name for name, _, _ in inner):
            return files
        files = inner
    return files


def _unpacked(source: Path, scratch: Path) -> Path:
    """A tar that can be read at random: the source itself, or its decompressed copy."""
    opener = _OPENERS.get(source.suffix)
    if opener is None:
        return source
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        with opener(source) as packed, scratch.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # gzip's and bz2's own have none
            raise UserError(f"{scratch}: cannot unpack {source.name} there ({error.strerror}); free some space, or unpack it") from None
        raise UserError(f"{source}: not a readable compressed tar ({error}); restore the file") from None
    return scratch
