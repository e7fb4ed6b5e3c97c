"""The captions of shards made elsewhere are what was indexed, or a message names the shard and its member and says what to do."""

import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data.text.origin import captions_of
from fasttrain.errors import UserError
from tests.data.altered_tars import BLOCK, alter
from tests.http_server import FaultyServer
from tests.labelled_images import Members, encoded, write_tar

FIRST, SECOND = "00000.tar", "00001.tar"
CAPTIONS = ["text 0", "json 1", "", "x" * BLOCK, "text 4", "json 5", "", ""]
INDEX = r"; restore the shard, or delete \S+/cache/indexes/\w+ to index the shards again$"


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of four samples: a txt, a json or nothing beside the image; the last one's txt is empty."""
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in (0, 1):
        members: Members = []
        for number in range(4 * shard, 4 * shard + 4):
            members.append((f"{number}.png", encoded(number, "png")))
            if number % 4 == 1:
                members.append((f"{number}.json", b'{"caption": "%s"}' % CAPTIONS[number].encode()))
            elif number != 2 and number != 6:
                members.append((f"{number}.txt", CAPTIONS[number].encode()))
        write_tar(folder / (FIRST, SECOND)[shard], members)
    return folder


def captions(place: object) -> list[str]:
    return captions_of(str(place)).captions


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:BLOCK])


def lengthen(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(BLOCK))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda folder: alter(folder / FIRST, "0.txt", b"text 9"),
            r"00000\.tar: the caption of a sample, '0\.txt' at byte \d+, is not what",
        ),
        (lambda folder: alter(folder / FIRST, "0.txt", b"text 0 and more"), r"'0\.txt' at byte"),
        (lambda folder: alter(folder / FIRST, "0.txt", b"text"), r"'0\.txt' at byte"),
        (lambda folder: alter(folder / FIRST, "0.txt", b""), r"'0\.txt' at byte"),
        (lambda folder: alter(folder / FIRST, "0.txt", b"text 0", "7.txt"), r"'7\.txt' at byte"),
        (lambda folder: alter(folder / SECOND, "5.json", b'{"caption": "json 6"}'), r"00001\.tar: the caption of a sample, '5\.json'"),
        (lambda folder: alter(folder / SECOND, "7.txt", b"no longer empty"), r"00001\.tar: the caption of a sample, '7\.txt'"),
        (lambda folder: cut(folder / SECOND), r"00001\.tar: cut short: 512 of 10240 bytes"),
        (lambda folder: lengthen(folder / SECOND), r"00001\.tar: longer than it was: 10752 of 10240 bytes"),
        (lambda folder: (folder / SECOND).unlink(), r"00001\.tar: missing"),
        (lambda folder: shutil.copy(folder / SECOND, folder / FIRST), r"00000\.tar: the caption of a sample, '4\.txt'"),
    ],
)
def test_what_is_not_what_was_indexed_is_told(shards: Path, change: Callable[[Path], object], told: str):
    place = f"{shards}/{{00000..00001}}.tar"
    assert captions(place) == captions(place) == CAPTIONS
    change(shards)
    with pytest.raises(UserError, match=f"^{re.escape(str(shards))}/.*{told}.*{INDEX}"):
        captions(place)


def test_with_the_index_deleted_they_are_read_anew(shards: Path, tmp_path: Path):
    assert captions(shards) == CAPTIONS
    alter(shards / FIRST, "0.txt", b"text 9")
    with pytest.raises(UserError, match=INDEX) as told:
        captions(shards)
    found = re.search(r"delete (\S+) to", str(told.value))
    assert found
    shutil.rmtree(found[1])
    assert captions(shards) == ["text 9", *CAPTIONS[1:]]


def test_a_tar_packed_anew_with_the_same_content_is_the_same(shards: Path):
    assert captions(shards) == CAPTIONS
    with tarfile.open(shards / FIRST) as tar:
        members = [(member, tar.extractfile(member)) for member in tar.getmembers()]
        with tarfile.open(shards / "new", "w", format=tarfile.USTAR_FORMAT) as new:
            for member, content in members:
                member.mtime, member.uid, member.uname = 1_700_000_000, 1000, "somebody"
                new.addfile(member, content)
    before = (shards / FIRST).read_bytes()
    (shards / "new").rename(shards / FIRST)
    assert (shards / FIRST).read_bytes() != before and captions(shards) == CAPTIONS


def test_an_index_of_images_alone_is_made_anew(shards: Path, tmp_path: Path):
    """As it was before texts and labels had digests: nine columns, and one digest a sample."""
    assert captions(shards) == CAPTIONS
    parts = sorted((tmp_path / "cache" / "indexes").rglob("*.npz"))
    for part in parts:
        with np.load(part) as arrays:
            old = dict(arrays)
        np.savez(part, samples=old["samples"][:, :9], digests=old["digests"][:, 0], told=old["told"])
    alter(shards / FIRST, "0.txt", b"text 9")
    assert captions(shards) == ["text 9", *CAPTIONS[1:]] and len(parts) == 2
    with np.load(parts[0]) as arrays:
        assert arrays["samples"].shape == (4, 11) and arrays["digests"].shape == (4, 3)


def test_a_copy_in_the_cache_that_is_damaged_is_fetched_anew(shards: Path, tmp_path: Path):
    with FaultyServer(shards) as server:
        place = f"{server.url}/{{00000..00001}}.tar"
        assert captions(place) == CAPTIONS
        (copy,) = (tmp_path / "cache" / "files").glob(f"*{FIRST}")
        alter(copy, "0.txt", b"text 9")
        assert captions(place) == CAPTIONS


def test_a_shard_that_changed_in_its_store_is_told_without_its_place_in_the_cache(shards: Path, tmp_path: Path):
    with FaultyServer(shards) as server:
        place = f"{server.url}/{{00000..00001}}.tar"
        assert captions(place) == CAPTIONS
        alter(shards / FIRST, "0.txt", b"text 9")
        assert captions(place) == CAPTIONS  # the copy in the cache is what was indexed
        for copy in (tmp_path / "cache" / "files").glob("*.tar"):
            copy.unlink()
        with pytest.raises(UserError, match=rf"^{re.escape(server.url)}/{FIRST}: the caption of a sample, '0\.txt'.*{INDEX}"):
            captions(place)
        (shards / FIRST).unlink()
        with pytest.raises(UserError, match=rf"{FIRST}: missing{INDEX}"):
            captions(place)
