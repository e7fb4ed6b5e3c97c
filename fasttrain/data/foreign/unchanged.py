"""Members read again, long after their shard was indexed: exactly what was indexed, or `Changed`.

The digest of a label or text is of its header's name and size too: without them one that grew behind what was read, or that now belongs
to another key, would pass for unchanged. An image's is of its content alone, which is what it is known by in the set.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import xxhash

from fasttrain.data.foreign.tar import BLOCK, Members, read_at
from fasttrain.errors import UserError

What = Literal["image", "label", "caption"]
_NAME, _SIZE = slice(0, 100), slice(124, 136)  # of a header [POSIX.1-2001 ustar]


class Changed(Exception):
    """What of a shard is not what was indexed; the message names the shard and the member."""


@contextmanager
def remedied(folder: Path) -> Iterator[None]:
    """Tells what changed, and what to do about it, as a UserError; folder: of the shards' index."""
    try:
        yield
    except Changed as change:
        raise UserError(f"{change}; restore the shard, or delete {folder} to index the shards again") from None


def read_words(descriptor: int, offset: int, size: int) -> tuple[bytes, int]:
    """The content of a label or text, and the digest of its name, size and content."""
    block = read_at(descriptor, offset - BLOCK, BLOCK + size)
    content = block[BLOCK:]
    return content, xxhash.xxh3_64_intdigest(block[_NAME] + block[_SIZE] + content)


def read_image(descriptor: int, offset: int, size: int) -> tuple[bytes, int]:
    """The content of an image, and its digest."""
    content = read_at(descriptor, offset, size)
    return content, xxhash.xxh3_64_intdigest(content)


def size_told(size: int | None, wanted: int) -> str:
    """How the size of a shard differs from what was indexed; None: it is missing."""
    if size is None:
        return "missing"
    return f"{'cut short' if size < wanted else 'longer than it was'}: {size} of {wanted} bytes"


class IndexedShard:
    """A shard, open to be read again.

    Args:
        path: where it is here.
        name: what messages call it.

    Raises:
        Changed: at entering, where it is gone, or may not be read any more.
    """

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name

    def __enter__(self) -> Self:
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            raise Changed(f"{self._name}: missing") from None
        except PermissionError:
            raise Changed(f"{self._name}: no permission to read it") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._descriptor)

    def check_size(self, wanted: int) -> None:
        """Raises Changed where the shard is not as many bytes long as when it was indexed."""
        size = os.fstat(self._descriptor).st_size
        if size != wanted:
            raise Changed(f"{self._name}: {size_told(size, wanted)}")

    def read(self, what: What, offset: int, size: int, digest: int) -> bytes:
        """The content of a member.

        Args:
            what: the member is to its sample.
            offset, size: where its content lay when the shard was indexed, bytes.
            digest: as it was then.

        Raises:
            Changed: it is another now.
        """
        content, found = (read_image if what == "image" else read_words)(self._descriptor, offset, size)
        if found != digest:
            raise Changed(f"{self._name}: the {what} of a sample, {self._member_at(offset)}, is not what was indexed")
        return content

    def _member_at(self, offset: int) -> str:
        """The member whose content begins there, if the shard still has one."""
        name = next((member.name for member in Members(self._descriptor) if member.offset == offset), None)
        return f"at byte {offset}" if name is None else f"{name!r} at byte {offset}"
