"""The members of a tar, read strictly [POSIX.1-2001 ustar and pax; GNU long names], and past damage.

Every header's checksum is verified. Behind a damaged one reading goes on at the next valid header on a 512-byte boundary, so what follows
is not lost. Nothing is ever extracted: links, devices, sparse and oversized files are left out and counted, so no name reaches a disk.
(A valid header inside another member's data is taken for one only behind damage, where the members' sizes are unknown.)
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BLOCK = 512
MOST_BYTES = 256 << 20  # of one member
_MOST_EXTENSION = 1 << 20  # of a pax record or a long name
_SCAN = 1 << 20
_REGULAR, _FOLDER, _PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"0\x007", b"5", b"x", b"g", b"L", b"K"
_REFUSED = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"6": "devices", b"S": "sparse files"}


class Member(NamedTuple):
    """A regular file: its name, where its content begins and its bytes; `gap` says that damage lies before it."""

    name: str
    offset: int
    size: int
    gap: bool


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


class Members:
    """The regular files of an open tar.

    Attributes:
        faults: what is wrong with the tar, in the order met.
        refused: how many members of a kind were left out.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._extension: dict[str, str] = {}
        self._ended = False
        self.faults: list[str] = []
        self.refused: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Member]:
        position: int | None = 0
        gap = found = False
        while position is not None and position + BLOCK <= self._size:
            block = self._read(position, BLOCK)
            header = _parse(block)
            if header is None:
                position, gap = self._resynchronise(position, block), True
                continue
            found = True
            size = self._size_of(header)
            if not 0 <= size <= self._size - position - BLOCK:
                held = self._size - position - BLOCK
                self._fault(f"a member that is cut short ({held} of {size} bytes)")
                position, gap = self._next_header(position + BLOCK), True
                continue
            member = self._member(header, position + BLOCK, size, gap)
            if member is not None:
                yield member
                gap = False
            position += BLOCK + -(-size // BLOCK) * BLOCK
        self._conclude(found)

    def _conclude(self, found: bool) -> None:
        if not found:
            self.faults = ["an empty file" if not self._size else "not a tar"]
        elif not self._ended:
            self.faults.append("no end marker: cut short")

    def _member(self, header: _Header, offset: int, size: int, gap: bool) -> Member | None:
        """The member of a header, unless it only says something about the next one, or is not to be used."""
        if header.kind in (_PAX, _LONG_NAME):
            self._extend(header.kind, offset, size)
            return None
        if header.kind in (_PAX_GLOBAL, _LONG_LINK):
            return None
        extension, self._extension = self._extension, {}
        if header.kind == _FOLDER:
            return None
        if header.kind not in (b"0", b"\0", b"7") or any(key.startswith("GNU.sparse") for key in extension):
            self.refused[_REFUSED.get(header.kind, "sparse files" if header.kind in _REGULAR else "members of an unknown kind")] += 1
            return None
        if size > MOST_BYTES:
            self.refused[f"members of more than {MOST_BYTES >> 20} MiB"] += 1
            return None
        return Member(extension.get("path", header.name), offset, size, gap)

    def _size_of(self, header: _Header) -> int:
        """The bytes behind a header; a pax record may know better."""
        if header.kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK) or "size" not in self._extension:
            return header.size
        text = self._extension["size"]
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1

    def _extend(self, kind: bytes, offset: int, size: int) -> None:
        if size > _MOST_EXTENSION:
            self.refused["names of more than 1 MiB"] += 1
            return
        content = self._read(offset, size)
        if kind == _LONG_NAME:
            self._extension["path"] = _text(content)
        else:
            self._extension.update(_records(content))

    def _resynchronise(self, position: int, block: bytes) -> int | None:
        """The next valid header behind a block that is none."""
        self._extension = {}
        ends = not any(block)
        following = self._next_header(position + BLOCK)
        if not ends:
            self._fault("a damaged header")
        elif following is not None:
            self._fault("an end marker in the middle")
        else:
            self._ended = True
        return following

    def _next_header(self, position: int) -> int | None:
        while position + BLOCK <= self._size:
            chunk = self._read(position, _SCAN)
            blocks = np.frombuffer(chunk, np.uint8, len(chunk) // BLOCK * BLOCK).reshape(-1, BLOCK)
            for row in np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)).tolist():
                if _parse(blocks[row].tobytes()) is not None:
                    return position + row * BLOCK
            position += max(len(blocks), 1) * BLOCK
        return None

    def _fault(self, what: str) -> None:
        self.faults.append(what)

    def _read(self, offset: int, size: int) -> bytes:
        return read_at(self._descriptor, offset, size)


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """So many bytes of a file from an offset on, fewer only where it ends."""
    parts = []
    while size and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def _parse(block: bytes) -> _Header | None:
    """A header block; None for any other."""
    if len(block) < BLOCK or block[257:262] != b"ustar":
        return None
    stored = _number(block[148:156])
    if stored is None or stored not in _checksums(block):
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return _Header(f"{prefix}/{name}" if prefix else name, size, block[156:157])


def _checksums(block: bytes) -> tuple[int, int]:
    """The sum over the header with its own field as blanks, of unsigned bytes and, as some old writers had it, of signed ones."""
    rest = block[:148] + b" " * 8 + block[156:]
    return sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes) -> int | None:
    """An octal number, or a GNU one in base 256."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=False) if field[0] == 0x80 else -1
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= byte < 56 for byte in digits) else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _records(content: bytes) -> dict[str, str]:
    """pax records, `LENGTH KEY=VALUE\\n` each; reading stops at one that is none."""
    found: dict[str, str] = {}
    while content:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = content[len(digits) + 1 : length - 1]
        key, mark, value = record.partition(b"=")
        if not mark or content[length - 1 : length] != b"\n":
            break
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return found
