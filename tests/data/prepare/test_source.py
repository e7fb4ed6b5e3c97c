"""Trees and tars of class folders list alike, wherever they lie."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import xxhash

from fasttrain.data.prepare.captions import Wanted
from fasttrain.data.prepare.images import prepare_images
from fasttrain.data.prepare.pixels import Unreadable
from fasttrain.data.prepare.source import open_source, read_place
from fasttrain.errors import UserError
from tests.labelled_images import SIDE, encoded

FILES = {"cat/2.jpg": b"two", "cat/1.jpg": b"one", "dog/deep/3.png": b"three", "README": b"no sample", "dog/.DS_Store": b"hidden"}


def write_tree(root: Path) -> Path:
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_tar(path: Path, prefix: str = "", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(params=["tree", "tar", "rooted tar", "gz", "xz", "bz2"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind = request.param
    if kind == "tree":
        return write_tree(tmp_path / "photos")
    if kind in ("tar", "rooted tar"):
        return write_tar(tmp_path / "photos.tar", "./" if kind == "tar" else "some/top/")
    return write_tar(tmp_path / f"photos.tar.{kind}", "root/", f"w:{kind}")


def test_every_form_lists_the_same_samples(source: Path, tmp_path: Path):
    with open_source(source, tmp_path / "out") as listing:
        assert listing.classes == ("cat", "dog")
        assert [(e.name, e.label) for e in listing.entries] == [("cat/1.jpg", 0), ("cat/2.jpg", 0), ("dog/deep/3.png", 1)]
        assert [read_place(listing.path, e.image) for e in listing.entries] == [b"one", b"two", b"three"]
        assert listing.xxh3 == xxhash.xxh3_128_hexdigest(b"cat/1.jpg\0003\ncat/2.jpg\0003\ndog/deep/3.png\0005\n")
        assert listing.name == source.name
    assert not (tmp_path / "out").exists()


def test_a_tar_of_one_class_keeps_it(tmp_path: Path):
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for name in ("cat/1.jpg", "cat/2.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    with open_source(tmp_path / "one.tar", tmp_path / "out") as listing:
        assert listing.classes == ("cat",)


def test_links_are_listed_as_unreadable(tmp_path: Path):
    tree = write_tree(tmp_path / "photos")
    (tree / "cat" / "gone.jpg").symlink_to("nowhere")
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        for name in ("cat/passwd", "dog/fifo"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE, "/etc/passwd") if "cat" in name else (tarfile.FIFOTYPE, "")
            tar.addfile(member)
    for source, count in [(tree, 1), (tmp_path / "linked.tar", 2)]:
        with open_source(source, tmp_path / "out") as listing:
            refused = [entry for entry in listing.entries if entry.image.offset < 0]
            assert len(refused) == count
            with pytest.raises(Unreadable, match="a link or a special file"):
                read_place(listing.path, refused[0].image)


def test_a_file_that_shrank_is_unreadable(tmp_path: Path):
    tree = write_tree(tmp_path / "photos")
    with open_source(tree, tmp_path / "out") as listing:
        (tree / "cat/1.jpg").write_bytes(b"o")
        with pytest.raises(Unreadable, match="1 of its 3 bytes"):
            read_place(listing.path, listing.entries[0].image)


def write_doubled(path: Path) -> Path:
    """Each name twice, as `tar --append` leaves it, and once more in another spelling."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(["cat/1.png", "cat/1.txt", "dog/2.png", "cat/1.png", "cat/1.txt", "./dog/2.png"]):
            content = encoded(number, "png") if name.endswith("png") else b"words %d" % number
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_of_members_with_one_name_the_last_is_taken_as_tar_does(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = write_doubled(tmp_path / "twice.tar")
    with open_source(source, tmp_path / "out", "txt") as listing:
        assert [(entry.name, entry.label) for entry in listing.entries] == [("cat/1.png", 0), ("dog/2.png", 1)]
        assert [read_place(listing.path, entry.image) for entry in listing.entries] == [encoded(3, "png"), encoded(5, "png")]
        assert listing.entries[0].caption and read_place(listing.path, listing.entries[0].caption) == b"words 4"
        found = listing.xxh3
    told = "twice.tar: 3 names come more than once ('cat/1.png', 'cat/1.txt', 'dog/2.png'); the last of each is taken, as tar does"
    assert [told in line for line in caplog.messages] == [True]
    subprocess.run(["tar", "xf", source, "--one-top-level=tree"], cwd=tmp_path, check=True)
    with open_source(tmp_path / "tree", tmp_path / "out", "txt") as tree:
        assert tree.xxh3 == found
    prepared = [tmp_path / name for name in ("of-tar", "of-tree")]
    for place, out in zip((source, tmp_path / "tree"), prepared, strict=True):
        assert prepare_images(place, out, SIDE, wanted=Wanted("txt")).uncaptioned == 1
    kept = ("shard-00000.tar", "captions.jsonl", "uncaptioned.jsonl", "labels.npy")
    assert all((prepared[0] / name).read_bytes() == (prepared[1] / name).read_bytes() for name in kept)


def test_a_missing_source(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: no such folder or tar"), open_source(tmp_path / "nowhere", tmp_path / "out"):
        pass


def test_an_empty_source(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(UserError, match=r"empty: no class folders .*expected empty/<class>"),
        open_source(tmp_path / "empty", tmp_path / "out"),
    ):
        pass


def test_a_source_without_class_folders(tmp_path: Path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"flat: no class folders"), open_source(tmp_path / "flat", tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["noise.tar", "noise.tar.xz", "noise.tar.gz", "noise.tar.bz2"])
def test_what_is_not_a_tar(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(os.urandom(4000))
    with pytest.raises(UserError, match=rf"{name}: not a readable"), open_source(tmp_path / name, tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_a_compressed_tar_cut_short(tmp_path: Path):
    path = write_tar(tmp_path / "photos.tar.xz", mode="w:xz")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"photos\.tar\.xz: not a readable compressed tar"), open_source(path, tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_a_stray_file_beside_class_folders_takes_no_classes_away(tmp_path: Path):
    root = write_tree(tmp_path / "photos")
    (root / "cat" / "1.txt").write_text("a cat")
    with open_source(root, tmp_path / "out", "txt") as listing:
        assert listing.classes == ("cat", "dog")
        assert [(e.name, e.label, e.caption is not None) for e in listing.entries] == [
            ("cat/1.jpg", 0, True),
            ("cat/2.jpg", 0, False),
            ("dog/deep/3.png", 1, False),
        ]
