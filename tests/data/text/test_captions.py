"""Captions out of files and class names, and each kept once."""

from pathlib import Path

import pytest

from fasttrain.data.text.captions import MOST_BYTES, NoCaption, caption_in, class_names, distinct, of_classes
from fasttrain.errors import UserError


@pytest.mark.parametrize(
    ("content", "kind", "caption"),
    [
        (b"A cat.\n", "txt", "A cat."),
        (b"  two\r\n lines\tof it ", "txt", "two lines of it"),
        ("\ufeffé ü".encode(), "txt", "é ü"),
        (b'{"caption": "a dog", "text": "other"}', "json", "a dog"),
        (b'{"text": "a dog", "width": 3}', "json", "a dog"),
        (b'{"caption": "", "text": "a dog"}', "json", "a dog"),
        (b'{"caption": ["first", "second"]}', "json", "first"),
        (rb'{"caption": "bad \ud800 half"}', "json", "bad ? half"),
        (b'{"caption": "a dog"}', "txt", '{"caption": "a dog"}'),
    ],
)
def test_the_caption_in_a_file(content: bytes, kind, caption: str):
    assert caption_in(content, kind) == caption


@pytest.mark.parametrize(
    ("content", "kind", "told"),
    [
        (b"", "txt", "an empty caption"),
        (b" \n\t", "txt", "an empty caption"),
        (b"\xff\xfe", "txt", "not UTF-8"),
        (b"x" * (MOST_BYTES + 1), "txt", "more than 1 MiB"),
        (b"{", "json", "cannot be read"),
        (b"[" * 100_000, "json", "cannot be read"),
        (b"[1]", "json", "json without caption or text"),
        (b'{"title": "x"}', "json", "json without caption or text"),
        (b'{"caption": 3}', "json", "json without caption or text"),
        (b'{"caption": []}', "json", "json without caption or text"),
        (b'{"caption": [["x"]]}', "json", "json without caption or text"),
        (b'{"caption": "  "}', "json", "an empty caption"),
    ],
)
def test_why_a_file_has_none(content: bytes, kind, told: str):
    with pytest.raises(NoCaption, match=told):
        caption_in(content, kind)


def test_class_names_in_a_template():
    assert of_classes(["cat", "great_white_shark"]) == ["a photo of a cat", "a photo of a great white shark"]
    assert of_classes(["{0.real}"], "{}, drawn") == ["{0.real}, drawn"]
    for wrong in ("a photo", "{} and {}", "{0}"):
        with pytest.raises(UserError, match=r"--template .*: write \{\} once"):
            of_classes(["cat"], wrong)


def test_words_of_classes_as_imagenets_synset_list_has_them(tmp_path: Path):
    path = tmp_path / "synsets.txt"
    path.write_text("n01440764 tench, Tinca tinca\n\nn02012849\tcrane\nn03126707 crane, machine\n")
    assert class_names(path, ["n01440764", "n03126707"]) == ["tench", "crane"]
    with pytest.raises(UserError, match=r"no words for 2 of 3 classes \(n1, n2\); add `folder words`"):
        class_names(path, ["n1", "n01440764", "n2"])
    path.write_text("a x\na y\n")
    with pytest.raises(UserError, match="names a twice"):
        class_names(path, ["a"])
    with pytest.raises(UserError, match=r"nowhere: cannot be read"):
        class_names(tmp_path / "nowhere", ["a"])


def test_each_caption_once_in_order_of_first_use():
    captions, rows = distinct(["b", "", "a", "b", "a", "c"])
    assert captions == ["", "b", "a", "c"] and rows.tolist() == [1, 0, 2, 1, 2, 3]
    assert distinct([])[0] == [""]
