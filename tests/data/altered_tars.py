"""One member of a tar changed where it stands, so that everything else stays where it was indexed."""

import tarfile
from pathlib import Path

BLOCK = 512


def alter(path: Path, name: str, content: bytes, renamed: str | None = None) -> None:
    """Gives a member other content, which must fit its blocks (or, of the last member, the padding behind), and perhaps another name."""
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
        is_last = tar.getmembers()[-1].name == name
    room = BLOCK if is_last else -(-member.size // BLOCK) * BLOCK
    assert len(content) <= room
    member.size, member.name = len(content), renamed or name
    whole = bytearray(path.read_bytes())
    whole[member.offset : member.offset_data] = member.tobuf(tarfile.USTAR_FORMAT)
    whole[member.offset_data : member.offset_data + room] = content.ljust(room, b"\0")
    path.write_bytes(whole)
    with tarfile.open(path) as tar:  # it is still a whole tar, in which that member alone is another
        found = tar.extractfile(renamed or name)
        assert found is not None and found.read() == content
