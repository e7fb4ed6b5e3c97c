"""Captions as text: read from the files that come with images, made of class names, and each kept once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fasttrain.errors import UserError

Kind = Literal["txt", "json"]
KINDS: tuple[Kind, ...] = ("txt", "json")
DEFAULT_TEMPLATE = "a photo of a {}"
MOST_BYTES = 1 << 20  # of a caption's file
_KEYS = ("caption", "text")
_NAMED = 3


class NoCaption(Exception):
    """Why a file gives no caption; the reason is the same on every machine and run."""


def clean(caption: str) -> str:
    """A caption in one line: runs of white space are one blank, so that equal captions are the same row."""
    return " ".join(caption.split())


def caption_in(content: bytes, kind: Kind) -> str:
    """The caption in a file: all of a txt, or of a json object its `caption` or else `text`; where that is a list, its first.

    Raises:
        NoCaption: empty, too large, not UTF-8, or no such key.
    """
    if len(content) > MOST_BYTES:
        raise NoCaption("a caption file of more than 1 MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise NoCaption("a caption that is not UTF-8") from None
    caption = clean(_in_json(text) if kind == "json" else text)
    if not caption:
        raise NoCaption("an empty caption")
    return caption


def _in_json(text: str) -> str:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise NoCaption("json that cannot be read") from None
    found = next((values[key] for key in _KEYS if values.get(key)), None) if isinstance(values, dict) else None
    first = found[0] if isinstance(found, list) else found
    if not isinstance(first, str):
        raise NoCaption(f"json without {' or '.join(_KEYS)}")
    # A lone surrogate ("\\ud800") is no character: neither a file nor a tokenizer takes it.
    return first.encode("utf-8", "replace").decode()


def of_classes(names: Sequence[str], template: str = DEFAULT_TEMPLATE) -> list[str]:
    """The caption of each class: its name, with blanks for underscores, in the template's one {}.

    Raises:
        UserError: a template without {}, or with more than one.
    """
    if template.count("{}") != 1:
        raise UserError(f"--template {template!r}: write {{}} once, where the class's name goes")
    return [clean(template.replace("{}", name.replace("_", " "))) for name in names]


def class_names(path: Path, classes: Sequence[str]) -> list[str]:
    """The words of each class, from a file of lines `folder words`: words up to the first comma, as ImageNet's synset lists have them.

    Raises:
        UserError: no such file, not UTF-8, a class that is missing from it, or twice in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {path}: cannot be read ({error}); give lines of `folder words`, in UTF-8") from None
    words: dict[str, str] = {}
    for line in filter(str.strip, lines):
        folder, _, told = line.strip().replace("\t", " ").partition(" ")
        if words.setdefault(folder, told) != told:
            raise UserError(f"--class-names {path}: names {folder} twice; keep one line of them")
    found = {folder: told.partition(",")[0].strip() for folder, told in words.items()}
    if missing := [name for name in classes if not found.get(name)]:
        named = f"{', '.join(missing[:_NAMED])}{' ...' if len(missing) > _NAMED else ''}"
        raise UserError(f"--class-names {path}: no words for {len(missing)} of {len(classes)} classes ({named}); add `folder words`")
    return [found[name] for name in classes]


def distinct(captions: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Each caption once, the empty one first and the others in order of first use, and which of them each sample has: int64 [samples]."""
    numbers = {"": 0}
    rows = np.fromiter((numbers.setdefault(caption, len(numbers)) for caption in captions), np.int64, len(captions))
    return list(numbers), rows
