"""Labelled images by name: a tree of class folders, or a tar of one (also .tar.gz, .tar.bz2, .tar.xz), or WebDataset shards."""

import bz2
import gzip
import logging
import lzma
import os
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import xxhash

from fasttrain.data.config import DataConfig
from fasttrain.data.files import LocalFiles
from fasttrain.data.foreign.opening import Foreign, open_parts
from fasttrain.data.foreign.pattern import pattern_of
from fasttrain.data.foreign.samples import Sample
from fasttrain.data.foreign.unchanged import IndexedShard, What, remedied
from fasttrain.data.prepare.pixels import Unreadable
from fasttrain.data.text.captions import KINDS, Kind
from fasttrain.errors import UserError

_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]
_LOG = logging.getLogger(__name__)
_NAMED = 3
_CAPTION_ENDINGS = tuple(f".{kind}" for kind in KINDS)


class Place(NamedTuple):
    """Where content lies.

    Attributes:
        file: below the source's path; "": the path itself, a tar.
        offset: its first byte; -1: a link or no file.
        size: bytes.
        digest: of a member of an indexed shard, which must be that when it is read; None: of any other content.
        what: such a member is.
    """

    file: str
    offset: int
    size: int
    digest: int | None = None
    what: What = "image"


class Entry(NamedTuple):
    """One image.

    Attributes:
        name: below the root.
        label: its class.
        image: where it lies.
        caption, caption_kind: where its caption does, if it has one.
        label_place: where its label was read, if that is a file of its own.
    """

    name: str
    label: int
    image: Place
    caption: Place | None = None
    caption_kind: Kind = "txt"
    label_place: Place | None = None


@dataclass(frozen=True)
class Listing:
    """What a source holds: files sorted by name, classes sorted by name (their order gives the labels)."""

    name: str
    path: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def xxh3(self) -> str:
        """Digest of the names and sizes: the same for a tree and its tar, wherever they lie. Of shards also of labels and contents."""
        hasher = xxhash.xxh3_128()
        for entry in self.entries:
            caption = "" if entry.caption is None else f"\0{entry.caption.size}"
            hasher.update(f"{entry.name}\0{entry.image.size}{caption}{_indexed(entry)}\n".encode())
        return hasher.hexdigest()


def _indexed(entry: Entry) -> str:
    """What only the index of shards knows of an entry: its label, which is not in its name as a folder's is, and digests."""
    digests = [entry.image.digest, entry.caption and entry.caption.digest]
    return "" if entry.image.digest is None else f"\0{entry.label}\0{digests}"


def read_place(path: Path, place: Place) -> bytes:
    """The bytes at a place in a source at `path` (a folder or an uncompressed tar).

    Raises:
        Unreadable: a link or special file, without permission, or not of the listed size.
        Changed: a member of a shard that is not what was indexed.
        OSError: the disk or network failed: that is no property of the file, and must stop the run rather than drop samples.
    """
    if place.offset < 0:
        raise Unreadable("a link or a special file")
    if place.digest is not None:
        with IndexedShard(path / place.file, str(path / place.file)) as shard:
            return shard.read(place.what, place.offset, place.size, place.digest)
    try:
        with (path / place.file if place.file else path).open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.size)
    except PermissionError:
        raise Unreadable("no permission to read it") from None
    if len(content) != place.size:
        raise Unreadable(f"{len(content)} of its {place.size} bytes")
    return content


@contextmanager
def open_source(source: Path, out: Path, captions: Kind | None = None) -> Iterator[Listing]:
    """The images of a class-folder tree, of a tar of one, or of a pattern of WebDataset shards, readable inside the context.

    A compressed tar is unpacked to one plain tar in `out`, to be read at random, and removed at the end.

    Args:
        source: folder, tar, or pattern with braces or a star.
        out: folder of the set to be made.
        captions: which files beside the images hold their captions; None: captions are not looked for. With captions, images may also
            lie in no class folder: then the set has no classes. Of WebDataset samples it is their txt, or else their json.

    Raises:
        UserError: nothing there, not a tar, no class folders, no files in them, or no space to unpack; inside the context, shards that are
            not what was indexed.
    """
    fresh = not out.exists()
    scratch = out / f"source.{os.getpid()}.tmp"
    try:
        if set("{*") & set(source.name) and not source.exists():
            found = _found(str(source))
            with remedied(found.folder):
                yield _shards(found, captions)
        else:
            yield _list(source, scratch, captions)
    finally:
        if out.is_dir():
            scratch.unlink(missing_ok=True)
            if fresh and not any(out.iterdir()):
                out.rmdir()


def _found(place: str) -> Foreign:
    """The shards on this machine that a pattern names."""
    if Path(place).parts[0].endswith(":"):  # a path has taken an address's second slash
        raise UserError(f"{place}: shards to be prepared must be on this machine; copy them first")
    pattern = pattern_of(place)
    assert pattern is not None  # braces or a star
    return open_parts(pattern, DataConfig(train=place), lambda: None)


def _shards(found: Foreign, captions: Kind | None) -> Listing:
    """The samples of shards, as their index has them; they have classes where they have labels. Raises Changed."""
    assert isinstance(found.files, LocalFiles)
    folder = found.files.folder
    for name, part in found.parts.items():
        with IndexedShard(folder / name, str(folder / name)) as shard:
            shard.check_size(part.bytes)
    entries = (_entry(name, sample, captions) for name, part in found.parts.items() for sample in part.rows())
    return Listing(found.name, folder, found.classes, tuple(entries))


def _entry(shard: str, sample: Sample, captions: Kind | None) -> Entry:
    """A sample as the index of its shard has it."""
    image = Place(shard, sample.offset, sample.size, sample.image_digest)
    text = Place(shard, sample.text_offset, sample.text_size, sample.text_digest, "caption")
    label = Place(shard, sample.label_offset, sample.label_size, sample.label_digest, "label")
    return Entry(
        f"{shard}:{sample.offset}",
        max(sample.label, 0),
        image,
        text if captions and sample.text_offset else None,
        "json" if sample.text_is_json else "txt",
        label if sample.label_offset else None,
    )


def _list(source: Path, scratch: Path, captions: Kind | None) -> Listing:
    if source.is_dir():
        path, found = source, _tree_files(source)
    elif source.is_file():
        path = _unpacked(source, scratch)
        found = _without_root(_tar_members(source, path))
    else:
        raise UserError(f"{source}: no such folder or tar of images; give a folder with one sub-folder a class, or a tar of one")
    return _labelled(source, path, found, captions)


def _labelled(source: Path, path: Path, found: Iterable[tuple[str, Place]], captions: Kind | None) -> Listing:
    """Class = the first folder of a name. Hidden files are no samples, nor, without captions, files outside all class folders."""
    seen = sorted(file for file in found if not PurePosixPath(file[0]).name.startswith("."))
    beside = _beside(seen) if captions else {}
    images = [file for file in seen if file[0] not in beside]
    flat = captions is not None and not any("/" in name for name, _ in images)
    inside = images if flat else [file for file in images if "/" in file[0]]
    if not inside:
        raise UserError(f"{source}: no class folders with files in them; expected {source.name}/<class>/<image>, one folder a class")
    classes = () if flat else tuple(sorted({name.partition("/")[0] for name, _ in inside}))
    labels = {name: label for label, name in enumerate(classes)}
    entries = tuple(
        Entry(name, labels.get(name.partition("/")[0], 0), place, beside.get(f"{_stem(name)}.{captions}"), captions or "txt")
        for name, place in inside
    )
    return Listing(source.name, path, classes, entries)


def _beside(files: list[tuple[str, Place]]) -> dict[str, Place]:
    """The files with captions that stand beside an image of the same name up to the ending."""
    images = {_stem(name) for name, _ in files if not name.endswith(_CAPTION_ENDINGS)}
    return {name: place for name, place in files if name.endswith(_CAPTION_ENDINGS) and _stem(name) in images}


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0] or file}"


def _tree_files(root: Path) -> Iterable[tuple[str, Place]]:
    """Every file by its name below the root."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(folder, file)
            name, readable = path.relative_to(root).as_posix(), path.is_file()
            yield name, Place(name, 0 if readable else -1, path.stat().st_size if readable else 0)


def _tar_members(source: Path, path: Path) -> list[tuple[str, Place]]:
    """Every member that is not a folder, by its name; of those that have one name the last, as `tar x` leaves it."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [m for m in tar if not m.isdir()]
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{source}: not a readable tar ({error}); give a folder of class folders or a tar of one") from None
    named = [(str(PurePosixPath(m.name)), Place("", m.offset_data if m.isreg() else -1, m.size)) for m in members]
    _tell_doubled(source, Counter(name for name, _ in named))
    return list(dict(named).items())


def _tell_doubled(source: Path, counts: Counter[str]) -> None:
    """Says, on rank 0, which names of a tar come more than once."""
    doubled = [name for name, count in counts.items() if count > 1]
    if doubled and os.environ.get("RANK", "0") == "0":
        named = ", ".join(map(repr, doubled[:_NAMED])) + (" ..." if len(doubled) > _NAMED else "")
        _LOG.warning("%s: %d names come more than once (%s); the last of each is taken, as tar does", source, len(doubled), named)


def _without_root(files: list[tuple[str, Place]]) -> list[tuple[str, Place]]:
    """Takes away the folders that all files share, as long as class folders remain below them."""
    while len({name.partition("/")[0] for name, _ in files}) == 1:
        inner = [(name.partition("/")[2], place) for name, place in files]
        if not any("/" in name for name, _ in inner):
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
