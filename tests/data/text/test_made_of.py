"""The same images with other captions, labels or names of classes are another set to their text, and the old one is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.data.config import DataConfig
from fasttrain.data.prepare.captions import Wanted
from fasttrain.data.prepare.images import prepare_images
from fasttrain.data.prepare.text import prepare_text
from fasttrain.data.shards import ShardSet
from fasttrain.data.text.encoder import TextEncoder
from fasttrain.data.text.table import TextTable
from fasttrain.errors import UserError
from tests.data.altered_tars import alter
from tests.labelled_images import encoded, write_tar


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of two images, each with a caption beside it."""
    for number, place in enumerate(("a/0", "a/1", "b/2", "b/3")):
        path = tmp_path / "tree" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 20 * number, np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}")
    return tmp_path / "tree"


def prepared(tree: Path, out: Path, captions: bool = True) -> Path:
    prepare_images(tree, out, 16, wanted=Wanted("txt") if captions else None)
    return out


def text_of(place: object, out: Path, encoder: TextEncoder, *names: str) -> Path:
    prepare_text(str(place), out, encoder, *names)
    return out


def opened(text: Path, place: object) -> TextTable:
    config = DataConfig(train=str(place), size=16)
    return TextTable.open(str(text), ShardSet.open(str(place), config).index, config)


def refused(text: Path, place: object, why: str) -> None:
    with pytest.raises(UserError, match=f"is of the set as it was: {why}; delete it and run `fasttrain prepare text` again"):
        opened(text, place)


def test_other_captions_of_the_same_images(tree: Path, tmp_path: Path, encoder: TextEncoder):
    one = prepared(tree, tmp_path / "one")
    text, of_names = text_of(one, tmp_path / "text", encoder), text_of(one, tmp_path / "names", encoder, "the letter {}")
    (tree / "a" / "1.txt").write_text("picture 7")
    other = prepared(tree, tmp_path / "other")
    assert opened(text, one).captions == 5
    refused(text, other, "the set has other captions now")
    assert opened(of_names, other).captions == 3, "which are not the set's own"
    text_of(other, tmp_path / "again", encoder)
    assert "picture 7" in opened(tmp_path / "again", other).head


def test_captions_that_a_set_had_not(tree: Path, tmp_path: Path, encoder: TextEncoder):
    captions = {path: path.read_text() for path in tree.rglob("*.txt")}
    for path in captions:
        path.unlink()
    bare = prepared(tree, tmp_path / "bare", captions=False)
    text = text_of(bare, tmp_path / "text", encoder)
    assert sorted(opened(text, bare).head) == ["a photo of a a", "a photo of a b"]
    for path, caption in captions.items():
        path.write_text(caption)
    refused(text, prepared(tree, tmp_path / "captioned"), "the set has captions now, and had none")


@pytest.mark.parametrize("template", [(), ("the letter {}",)])
def test_other_classes_of_the_same_images(tree: Path, tmp_path: Path, encoder: TextEncoder, template: tuple[str, ...]):
    one = prepared(tree, tmp_path / "one", captions=False)
    text = text_of(one, tmp_path / "text", encoder, *template)
    opened(text, one)
    shutil.move(tree / "b", tree / "c")
    refused(text, prepared(tree, tmp_path / "other", captions=False), "the set has other labels or classes now")
    index = ShardSet.open(str(one)).index.model_copy(update={"labels_xxh3": "0" * 32})
    with pytest.raises(UserError, match="other labels or classes now"):
        TextTable.open(str(text), index, DataConfig(train=str(one)))


def test_other_captions_in_shards_made_elsewhere(tmp_path: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "shards" / "00000.tar"
    place.parent.mkdir()
    write_tar(place, [(f"{n}.{end}", content) for n in range(3) for end, content in (("png", encoded(n, "png")), ("txt", b"text %d" % n))])
    text = text_of(place, tmp_path / "text", encoder)
    assert opened(text, place).captions == 4
    alter(place, "1.txt", b"text 7")
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "anew"))
    refused(text, place, "the set has other captions now")
