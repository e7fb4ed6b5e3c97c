"""Shards made elsewhere: indexed once, read right, and whatever is wrong with them named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from fasttrain.data.config import DataConfig
from fasttrain.data.index import Index
from fasttrain.data.prepare.pixels import read_square
from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError
from tests.labelled_images import SIDE, encoded, label_of, number_of, sample, told_apart, write_set, write_tar

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))


def open_set(place: object, **settings: Any) -> ShardSet:
    settings = {"size": SIDE, "max_damaged": 1, "retry_seconds": 0, **settings}
    return ShardSet.open(str(place), DataConfig(train=str(place), **settings))


def numbers(shards: ShardSet) -> list[int]:
    """The number each image shows, -1 for one that is unreadable; every label must be its image's own."""
    found = shards.gather(np.arange(len(shards)))
    seen = list(told_apart(found.arrays, found.labels))
    assert all(own for (_, own), fine in zip(seen, found.readable, strict=True) if fine)
    return [number if fine else -1 for (number, _), fine in zip(seen, found.readable, strict=True)]


@pytest.mark.parametrize("place", ["", "/train-{00000..00003}.tar", "/train-*.tar", "/train-0000{0,1,2,3}.tar"])
def test_a_set_is_read_as_it_was_written(tmp_path: Path, place: str):
    folder = write_set(tmp_path / "set", [5, 0, 7, 1], ("png", "jpg", "webp", "npy"))
    shards = open_set(f"{folder}{place}")
    assert numbers(shards) == list(range(13))
    assert shards.index.shard_samples == (5, 0, 7, 1) and shards.index.shape == (3, SIDE, SIDE)
    assert shards.index.classes == tuple(map(str, range(10))) and shards.index.layout == "members"
    assert Index.model_validate_json(shards.index.model_dump_json()) == shards.index
    assert shards.damage.news() == []


def test_what_webdatasets_own_writer_makes(tmp_path: Path):
    with webdataset.TarWriter(str(tmp_path / "a-0.tar"), encoder=False) as tar:
        for n in range(6):
            tar.write({"__key__": f"folder.x/{n:03d}", "cls": str(label_of(n)).encode(), "jpg": encoded(n, "jpg"), "txt": b"words"})
    assert numbers(open_set(tmp_path / "a-{0..0}.tar")) == list(range(6))


def test_images_are_cropped_and_resized_as_prepare_does(tmp_path: Path):
    file = io.BytesIO()
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)).save(file, "PNG")
    write_tar(tmp_path / "a.tar", [("1.png", file.getvalue())])
    shards = open_set(tmp_path / "a.tar", size=24)
    np.testing.assert_array_equal(shards.gather(np.array([0])).arrays[0], read_square(file.getvalue(), 24).pixels)
    assert shards.index.num_classes == 0 and shards.labels.tolist() == [0]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_labels_in_json(tmp_path: Path, kind: int):
    key = "a" * 60 + "/" + "b" * (60 if kind == tarfile.USTAR_FORMAT else 160)
    write_tar(tmp_path / "a.tar", [m for n in range(4) for m in sample(n, key=f"{key}{n}", label="json")], kind)
    assert numbers(open_set(tmp_path / "a.tar")) == [0, 1, 2, 3]


def test_an_index_is_made_once_and_only_what_is_missing_or_damaged_again(tmp_path: Path):
    folder = write_set(tmp_path / "set", [3, 4])
    before = open_set(folder)
    (index,) = (tmp_path / "cache" / "indexes").iterdir()
    parts = sorted(index.glob("*.npz"))
    assert len(parts) == 2
    times = parts[0].stat().st_mtime_ns
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    again = open_set(folder)
    assert again.index == before.index and numbers(again) == list(range(7))
    assert parts[0].stat().st_mtime_ns == times
    content = bytearray(parts[0].read_bytes())
    content[len(content) // 2] ^= 1
    parts[0].write_bytes(content)
    assert open_set(folder).index == before.index


def test_size_must_be_given(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.size is missing: images of .*set \(1 shards\)"):
        open_set(write_set(tmp_path / "set", [1]), size=None)


def _told(tmp_path: Path, members: list, caplog: pytest.LogCaptureFixture, **settings: Any) -> tuple[list[int], str]:
    write_tar(tmp_path / "a.tar", members)
    found = numbers(open_set(tmp_path / "a.tar", **settings))
    return found, caplog.text


def test_keys_that_come_twice_cost_that_sample_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    members = [*sample(0), *sample(1), *sample(2), *sample(1), *sample(3)]
    found, told = _told(tmp_path, members, caplog)
    assert found == [0, 2, 3] and "a.tar: 1 keys that come twice; left out" in told


def test_interleaved_keys_are_no_samples(tmp_path: Path):
    pairs = [sample(n) for n in range(4)]
    write_tar(tmp_path / "a.tar", [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)])
    with pytest.raises(UserError, match="not one sample in 1 shards: 4 keys that come twice"):
        open_set(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("x.cls", b"3")], "samples without an image"),
        ([("x.png", encoded(9, "png"))], "samples without a label, where others have one"),
        ([("x.cls", b"three"), ("x.png", encoded(9, "png"))], "labels that are no whole number"),
        ([("x.cls", b"-1"), ("x.png", encoded(9, "png"))], "labels that are no whole number"),
        ([("x.cls", b"5000000"), ("x.png", encoded(9, "png"))], "labels outside 0 .. 999999"),
        ([("x.json", b'{"label": '), ("x.png", encoded(9, "png"))], "json that cannot be read"),
        ([("x.json", b"[" * 100_000), ("x.png", encoded(9, "png"))], "json that cannot be read"),
        ([("x.json", b'{"label": true}'), ("x.png", encoded(9, "png"))], "samples without a label, where others have one"),
        ([("x.png", encoded(9, "png")), ("x.png", encoded(8, "png")), ("x.cls", b"1")], "samples with two members of one ending"),
        ([("x.cls", b" " * MIB + b"1"), ("x.png", encoded(9, "png"))], "labels of more than 1 MiB"),
        ([("x.cls", b"1"), ("x.txt", b"a" * MIB + b"b"), ("x.png", encoded(9, "png"))], "captions of more than 1 MiB"),
        ([("x.cls", b"1"), ("x.json", b" " * MIB + b"{}"), ("x.png", encoded(9, "png"))], "captions of more than 1 MiB"),
    ],
)
def test_a_sample_that_is_not_whole_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture, members: list, why: str):
    found, told = _told(tmp_path, [*sample(0), *members, *sample(1)], caplog)
    assert found == [0, 1] and f"1 {why}" in told


def test_pickles_are_never_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    canary = tmp_path / "was-here"
    bomb = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    members = [(f"000000000.{ending}", bomb) for ending in ("pkl", "pyd", "pth", "pickle", "pt", "npz")]
    found, told = _told(tmp_path, [*sample(0), *members], caplog)
    assert found == [0] and "members not used, and never opened: pkl (1)" in told
    assert not canary.exists()
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    write_tar(tmp_path / "b.tar", [*sample(0), ("1.npy", objects.getvalue()), ("1.cls", b"1")])
    shards = open_set(tmp_path / "b.tar")
    assert numbers(shards) == [0, -1] and "not of uint8" in shards.damage.news()[0].why


def test_links_and_devices_are_refused_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            link = tarfile.TarInfo(f"{number}.png")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        for name, content in sample(5):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert numbers(open_set(tmp_path / "a.tar")) == [5]
    assert "2 links" in caplog.text and "2 devices" in caplog.text


def test_images_that_do_not_decode_are_replaced_and_named(tmp_path: Path):
    cut, bomb = encoded(7, "jpg")[:-200], io.BytesIO()
    np.lib.format.write_array_header_1_0(bomb, {"descr": "|u1", "fortran_order": False, "shape": (3, 10**6, 10**6)})
    bad = [("b.jpg", cut), ("b.cls", b"1"), ("c.npy", bomb.getvalue()), ("c.cls", b"1"), ("d.png", b"%!PS-Adobe EPSF"), ("d.cls", b"1")]
    write_tar(tmp_path / "a.tar", [*sample(0), *bad, *sample(1)])
    shards = open_set(tmp_path / "a.tar")
    assert numbers(shards) == [0, -1, -1, -1, 1]
    (told,) = shards.damage.news()
    assert told.unreadable == 3 and "runcated" in told.why


def test_a_set_with_nothing_in_it(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="not one sample in 1 shards: an empty file"):
        open_set(tmp_path / "a.tar")
    with pytest.raises(UserError, match="2 of 2 shards are missing"):
        open_set(tmp_path / "b-{0..1}.tar", max_damaged=0.5)


def test_counts_written_beside_the_shards_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = write_set(tmp_path / "set", [3, 4])
    (folder / "train-00000_stats.json").write_text(json.dumps({"successes": 5}))
    (folder / "sizes.json").write_text(json.dumps({"train-00000.tar": 9, "train-00001.tar": 4}))
    open_set(folder)
    assert "train-00000.tar: holds 3 samples that can be used, where its maker wrote 5" in caplog.text
    assert "train-00001" not in caplog.text


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("x-{3..1}.tar", "count upwards"),
        ("x-{0..2.tar", "left open"),
        ("{a,b}/x.tar", "no file name"),
        ("x-{a,a}.tar", "twice"),
        ("x*.tar", "no file"),
    ],
)
def test_patterns_that_name_nothing(tmp_path: Path, pattern: str, told: str):
    with pytest.raises(UserError, match=told):
        open_set(tmp_path / pattern)


@pytest.mark.parametrize("place", ["", "/train-{00000..00002}.tar"])
def test_what_changes_after_the_index_was_made_is_damage(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture):
    folder = write_set(tmp_path / "set", [10, 10, 10])
    open_set(f"{folder}{place}")
    content = bytearray((folder / "train-00000.tar").read_bytes())
    at = bytes(content).index(encoded(4, "png"))
    content[at + 20] ^= 1
    (folder / "train-00000.tar").write_bytes(content)
    (folder / "train-00001.tar").rename(folder / "train-00009.tar")
    shards = open_set(f"{folder}{place}")
    assert ("1 shards there are not used" in caplog.text) == (not place)
    assert numbers(shards) == [n if n != 4 and not 10 <= n < 20 else -1 for n in range(30)]
    told = [each.told() for each in shards.damage.news()]
    assert told == [
        "train-00001.tar: 10 of 10 samples unreadable (missing); replaced",
        "train-00000.tar: 1 of 10 samples unreadable (its content is not what was indexed); replaced",
    ]
    assert number_of(open_set(f"{folder}{place}", verify=False).gather(np.array([5])).arrays[0]) == 5


def test_halves_on_both_sides_of_damage_never_meet(tmp_path: Path):
    """One key before and behind a damaged header: the label of the first must not stand on the image of the second."""
    label, image = sample(1, key="same")[0], sample(2, key="same")[1]
    assert (label[0], image[0]) == ("same.cls", "same.png") and label_of(1) != label_of(2)
    whole = [member for n in (7, 8) for member in sample(n)]
    tar = write_tar(tmp_path / "a-0.tar", [*whole, label, ("same.txt", b"words"), image])
    content = bytearray(tar.read_bytes())
    content[content.index(b"same.txt")] ^= 1
    tar.write_bytes(content)
    assert numbers(open_set(tmp_path / "a-{0..0}.tar")) == [7, 8]
