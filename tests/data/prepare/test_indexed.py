"""Shards made elsewhere as a source: what is made of them is what was indexed, or nothing is made."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data.prepare.captions import Wanted
from fasttrain.data.prepare.images import prepare_images
from fasttrain.data.prepare.latents import prepare_latents
from fasttrain.data.prepare.source import open_source
from fasttrain.data.shards import ShardSet
from fasttrain.data.vae import Vae
from fasttrain.errors import UserError
from tests.data.altered_tars import BLOCK, alter
from tests.labelled_images import SIDE, Members, encoded, label_of, told_apart, write_tar

from ..conftest import contents

COUNT = 8
SHARDS = "{0..1}.tar"
INDEX = r"; restore the shard, or delete \S+/cache/indexes/\w+ to index the shards again$"
CAPTIONS = Wanted("txt")


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of four samples; labels in a cls in the first, in a json in the second."""
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in (0, 1):
        members: Members = []
        for n in range(4 * shard, 4 * shard + 4):
            label = (f"{n}.json", b'{"label": %d}' % label_of(n)) if shard else (f"{n}.cls", b"%d" % label_of(n))
            members += [label, (f"{n}.png", encoded(n, "png")), (f"{n}.txt", b"number %d" % n)]
        write_tar(folder / f"{shard}.tar", members)
    return folder


def prepare(shards: Path, out: Path, wanted: Wanted | None = CAPTIONS) -> None:
    prepare_images(shards / SHARDS, out, SIDE, shard_size=2, wanted=wanted)


def test_labels_and_captions_are_their_images_own(shards: Path, tmp_path: Path):
    prepare(shards, tmp_path / "set")
    found = ShardSet.open(tmp_path / "set").gather(np.arange(COUNT))
    seen = list(told_apart(found.arrays, found.labels))
    assert sorted(seen) == [(number, True) for number in range(COUNT)]
    captions = [json.loads(line) for line in (tmp_path / "set" / "captions.jsonl").read_text().splitlines()]
    assert captions == [f"number {number}" for number, _ in seen]


def other_image(shards: Path) -> None:
    alter(shards / "0.tar", "3.png", encoded(3, "png")[:-1] + b"x")  # as many bytes as it was


def cut(shards: Path) -> None:
    (shards / "1.tar").write_bytes((shards / "1.tar").read_bytes()[: 3 * BLOCK])


CHANGES = [
    (lambda shards: alter(shards / "0.tar", "3.txt", b"number 9"), r"0\.tar: the caption of a sample, '3\.txt' at byte \d+, is not what"),
    (lambda shards: alter(shards / "0.tar", "3.txt", b"number 33"), r"0\.tar: the caption of a sample, '3\.txt'"),
    (lambda shards: alter(shards / "0.tar", "3.cls", b"9"), r"0\.tar: the label of a sample, '3\.cls'"),
    (lambda shards: alter(shards / "0.tar", "3.cls", b"%d0" % label_of(3)), r"0\.tar: the label of a sample, '3\.cls'"),
    (lambda shards: alter(shards / "1.tar", "5.json", b'{"label": 9}'), r"1\.tar: the label of a sample, '5\.json'"),
    (other_image, r"0\.tar: the image of a sample, '3\.png'"),
    (cut, r"1\.tar: cut short: 1536 of \d+ bytes"),
    (lambda shards: (shards / "1.tar").unlink(), r"1\.tar: missing"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_what_is_not_what_was_indexed_ends_the_preparation(shards: Path, tmp_path: Path, change: Callable[[Path], None], told: str):
    prepare(shards, tmp_path / "before")
    change(shards)
    with pytest.raises(UserError, match=f"^{re.escape(str(shards))}/{told}.*{INDEX}"):
        prepare(shards, tmp_path / "set")
    assert not (tmp_path / "set" / "index.json").exists()


def test_latents_tell_it_from_their_threads(shards: Path, vae_folder: Path, tmp_path: Path):
    prepare(shards, tmp_path / "before")
    alter(shards / "0.tar", "3.cls", b"9")
    with pytest.raises(UserError, match=f"the label of a sample.*{INDEX}"):
        prepare_latents(shards / SHARDS, tmp_path / "latents", Vae.load(str(vae_folder)), SIDE, threads=2)


def test_captions_that_are_not_kept_may_change(shards: Path, tmp_path: Path):
    prepare(shards, tmp_path / "before", wanted=None)
    alter(shards / "0.tar", "3.txt", b"number 9")
    prepare(shards, tmp_path / "set", wanted=None)
    assert contents(tmp_path / "set") == contents(tmp_path / "before")


@pytest.mark.parametrize(
    "change",
    [
        lambda shards: alter(shards / "0.tar", "3.cls", b"9"),
        lambda shards: alter(shards / "1.tar", "5.json", b'{"label": 9}'),
        lambda shards: alter(shards / "0.tar", "3.txt", b"number 9"),
        other_image,
    ],
)
def test_shards_changed_and_indexed_anew_are_another_set(shards: Path, tmp_path: Path, change: Callable[[Path], None]):
    """Begun with the one and ended with the other, a set would hold both."""
    prepare(shards, tmp_path / "set")
    for left in ("index.json", "shard-00003.tar"):  # as an interruption leaves it
        (tmp_path / "set" / left).unlink()
    change(shards)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"set: already holds a different set \(source"):
        prepare(shards, tmp_path / "set")


def test_the_same_shards_indexed_anew_are_the_same_set(shards: Path, tmp_path: Path):
    prepare(shards, tmp_path / "set")
    whole = contents(tmp_path / "set")
    (tmp_path / "set" / "shard-00003.tar").unlink()
    shutil.rmtree(tmp_path / "cache")
    alter(shards / "0.tar", "3.cls", b"%d\n" % label_of(3))  # the same label, written otherwise
    prepare(shards, tmp_path / "set")
    assert contents(tmp_path / "set") == whole
    with open_source(shards / SHARDS, tmp_path / "out") as bare, open_source(shards / SHARDS, tmp_path / "out", "txt") as captioned:
        assert bare.xxh3 != captioned.xxh3
