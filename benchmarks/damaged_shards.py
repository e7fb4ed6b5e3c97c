"""Ways in which a shard may be damaged: each a function of a generator and the sound bytes."""

from collections.abc import Callable

import numpy as np

BLOCK = 512
Content = bytes | None  # None: the file is gone
Damage = Callable[[np.random.Generator, bytes], Content]


def _headers(content: bytes) -> list[int]:
    """Where the tar's headers are."""
    return [at for at in range(0, len(content) - BLOCK + 1, BLOCK) if content[at + 257 : at + 262] == b"ustar"]


def _a_header(rng: np.random.Generator, content: bytes) -> int:
    return int(rng.choice(_headers(content)))


def _sealed(header: bytearray) -> bytes:
    """A changed header with its checksum made right again."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _changed(content: bytes, at: int, change: Callable[[bytearray], None]) -> bytes:
    header = bytearray(content[at : at + BLOCK])
    change(header)
    return content[:at] + _sealed(header) + content[at + BLOCK :]


def flip(rng: np.random.Generator, content: bytes) -> Content:
    """One to four bits anywhere."""
    damaged = bytearray(content)
    for place in rng.integers(0, len(content), rng.integers(1, 5)):
        damaged[place] ^= 1 << rng.integers(8)
    return bytes(damaged)


def flip_in_header(rng: np.random.Generator, content: bytes) -> Content:
    """One bit of a header."""
    damaged = bytearray(content)
    damaged[_a_header(rng, content) + rng.integers(BLOCK)] ^= 1 << rng.integers(8)
    return bytes(damaged)


def cut(rng: np.random.Generator, content: bytes) -> Content:
    """Cut anywhere."""
    return content[: rng.integers(len(content))]


def cut_at_header(rng: np.random.Generator, content: bytes) -> Content:
    """Cut where a member begins: what other readers take for the end."""
    return content[: _a_header(rng, content)]


def insert(rng: np.random.Generator, content: bytes) -> Content:
    """Bytes put in: blocks at a boundary, or any number anywhere."""
    whole = rng.integers(2)
    at = int(rng.integers(len(content) // BLOCK)) * BLOCK if whole else int(rng.integers(len(content)))
    return content[:at] + rng.bytes(int(rng.integers(1, 5)) * BLOCK if whole else int(rng.integers(1, 2000))) + content[at:]


def remove(rng: np.random.Generator, content: bytes) -> Content:
    """Bytes taken out."""
    at, count = int(rng.integers(len(content))), int(rng.integers(1, 4000))
    return content[:at] + content[at + count :]


def lose_member(rng: np.random.Generator, content: bytes) -> Content:
    """A member taken out whole."""
    headers = [*_headers(content), len(content)]
    which = int(rng.integers(len(headers) - 2))
    return content[: headers[which]] + content[headers[which + 1] :]


def overwrite(rng: np.random.Generator, content: bytes) -> Content:
    """A stretch of zeros or noise, as a disk may leave it."""
    at, count = int(rng.integers(len(content))), int(rng.integers(1, 20_000))
    filling = bytes(count) if rng.integers(2) else rng.bytes(count)
    return (content[:at] + filling + content[at + count :])[: len(content)]


def no_tar(rng: np.random.Generator, content: bytes) -> Content:
    """Noise, of the right size or another."""
    return rng.bytes(len(content) if rng.integers(2) else int(rng.integers(1, 100_000)))


def empty(rng: np.random.Generator, content: bytes) -> Content:
    """A file of no bytes."""
    return b""


def gone(rng: np.random.Generator, content: bytes) -> Content:
    """No file."""
    return None


def append(rng: np.random.Generator, content: bytes) -> Content:
    """Garbage at the end."""
    return content + rng.bytes(int(rng.integers(1, 10_000)))


def link(rng: np.random.Generator, content: bytes) -> Content:
    """A member turned into a link out of the tar, its checksum right."""

    def change(header: bytearray) -> None:
        header[156:157] = rng.choice([b"1", b"2"])
        header[157:168] = b"/etc/passwd"

    return _changed(content, _a_header(rng, content), change)


def huge(rng: np.random.Generator, content: bytes) -> Content:
    """A member that says it is terabytes long, its checksum right."""

    def change(header: bytearray) -> None:
        header[124:136] = b"\x80" + int(rng.integers(2**40, 2**62)).to_bytes(11, "big")

    return _changed(content, _a_header(rng, content), change)


KINDS: dict[str, Damage] = {
    each.__name__: each
    for each in (
        flip,
        flip_in_header,
        cut,
        cut_at_header,
        insert,
        remove,
        lose_member,
        overwrite,
        no_tar,
        empty,
        gone,
        append,
        link,
        huge,
    )
}
