"""Files that are whole or as they were."""

import resource
from pathlib import Path

import pytest

from fasttrain.files import digest, whole, write_whole


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """The write fails half-way for real: through a limit on the size of files."""
    target = tmp_path / "grid.png"
    write_whole(target, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(target, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with whole(tmp_path / "new") as draft:
            draft.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert not list(tmp_path.iterdir())


def test_a_digest_sees_one_bit(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(1000))
    other.write_bytes(bytes(999) + b"\x01")
    assert digest(one) != digest(other) and len(digest(one)) == 32
