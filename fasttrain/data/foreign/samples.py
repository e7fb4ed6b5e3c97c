"""Members to samples by webdataset's rule: adjacent members of one key, which is the path up to the first dot behind the last slash.

A sample needs one image (jpg, jpeg, png, webp, or npy) and, in a set with classes, one label (cls, or an integer `label`, `class` or `cls`
in json). Nothing else is opened, pickles least of all. A key that comes twice, or a part lost in damage, costs that sample and no other:
halves never meet across shards, damage or other keys.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from fasttrain.data.foreign.decode import dimensions
from fasttrain.data.foreign.tar import Member, Members
from fasttrain.data.foreign.unchanged import read_image, read_words

IMAGES = ("jpg", "jpeg", "png", "webp")
ARRAY, LABEL, JSON, TEXT = "npy", "cls", "json", "txt"
NO_LABEL = -1
MOST_CLASSES = 1_000_000
_LABEL_KEYS = ("label", "class", "cls")
_MOST_WORD_BYTES = 1 << 20  # of a label or a text
_USED = {*IMAGES, ARRAY, LABEL, JSON, TEXT}


class Sample(NamedTuple):
    """A sample of a shard.

    Attributes:
        offset, size: where its image lies, bytes.
        is_array: whether that is an npy array.
        label: its class, NO_LABEL for none.
        text_offset, text_size: where its txt lies, or else its json, bytes; 0 where it has neither.
        height, width: of the upright image, pixels; 0 where its header cannot be read.
        text_is_json: whether that is its json.
        label_offset, label_size: where its cls lies, or else its json, bytes; 0 where it has neither.
        image_digest, label_digest, text_digest: see `unchanged`; 0 where it has no such member.
    """

    offset: int
    size: int
    is_array: bool
    label: int
    text_offset: int
    text_size: int
    height: int
    width: int
    text_is_json: bool
    label_offset: int
    label_size: int
    image_digest: int
    label_digest: int
    text_digest: int


class Found(NamedTuple):
    """What a shard holds.

    samples: the good ones. lost: how many were left out, by reason. faults: of the tar. refused, unused: members left out, by kind.
    labelled: whether any label was seen.
    """

    samples: list[Sample]
    lost: Counter[str]
    faults: list[str]
    refused: Counter[str]
    unused: Counter[str]
    labelled: bool


class _Faulty(Exception):
    """Why a group of members is no sample."""


def find_samples(descriptor: int) -> Found:
    """The samples of an open tar, in its order."""
    members = Members(descriptor)
    kept: dict[str, Sample] = {}
    lost: dict[str, str] = {}
    unused: Counter[str] = Counter()
    labelled = False
    for key, fields, doubled in _groups(members, unused):
        labelled |= LABEL in fields
        try:
            sample = _sample(descriptor, fields, doubled)
            if key in kept or key in lost:
                raise _Faulty("keys that come twice")
        except _Faulty as fault:
            kept.pop(key, None)
            lost[key] = str(fault)
            continue
        kept[key] = sample
        labelled |= sample.label != NO_LABEL
    return Found(list(kept.values()), Counter(lost.values()), members.faults, members.refused, unused, labelled)


def _groups(members: Members, unused: Counter[str]) -> Iterator[tuple[str, dict[str, Member], bool]]:
    """Key, members by ending, and whether an ending came twice, of each run of adjacent members with one key."""
    key: str | None = None
    fields: dict[str, Member] = {}
    doubled = False
    for member in members:
        own, ending = split_key(member.name)
        if own != key or member.gap:
            if fields:
                yield key or "", fields, doubled
            key, fields, doubled = own, {}, False
        if own is None or ending not in _USED:
            unused[ending or "no ending"] += 1
            continue
        doubled |= ending in fields
        fields[ending] = member
    if fields:
        yield key or "", fields, doubled


def split_key(name: str) -> tuple[str | None, str]:
    """webdataset's `base_plus_ext`: the path up to the first dot behind the last slash, and what is behind it in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem and dot else (None, "")


def _sample(descriptor: int, fields: dict[str, Member], doubled: bool) -> Sample:
    """The sample of a group. Raises _Faulty."""
    if doubled:
        raise _Faulty("samples with two members of one ending")
    image = next((fields[ending] for ending in (*IMAGES, ARRAY) if ending in fields), None)
    if image is None:
        raise _Faulty("samples without an image")
    label, label_place, label_digest = _label(descriptor, fields)
    content, image_digest = read_image(descriptor, image.offset, image.size)
    is_array = split_key(image.name)[1] == ARRAY
    seen = dimensions(content, is_array)
    text = fields.get(TEXT) or fields.get(JSON)
    own_json = text is not None and TEXT not in fields
    text_place = (text.offset, text.size) if text else (0, 0)
    text_digest = _words(descriptor, text, "captions")[1] if text else 0
    digests = (image_digest, label_digest, text_digest)
    return Sample(image.offset, image.size, is_array, label, *text_place, *seen, own_json, *label_place, *digests)


def _label(descriptor: int, fields: dict[str, Member]) -> tuple[int, tuple[int, int], int]:
    """The label of a group, and where it was looked for: offset and size, and digest. Raises _Faulty."""
    member = fields.get(LABEL) or fields.get(JSON)
    if member is None:
        return NO_LABEL, (0, 0), 0
    content, digest = _words(descriptor, member, "labels")
    label = _own_label(content) if LABEL in fields else _json_label(content)
    return label, (member.offset, member.size), digest


def _words(descriptor: int, member: Member, what: str) -> tuple[bytes, int]:
    """The content of a label or text, and its digest. Raises _Faulty, unread, where it is larger than any is."""
    if member.size > _MOST_WORD_BYTES:
        raise _Faulty(f"{what} of more than 1 MiB")
    return read_words(descriptor, member.offset, member.size)


def _own_label(content: bytes) -> int:
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", content):
        raise _Faulty("labels that are no whole number")
    return _in_range(int(content))


def _json_label(content: bytes) -> int:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise _Faulty("json that cannot be read") from None
    found = [values[key] for key in _LABEL_KEYS if type(values.get(key)) is int] if isinstance(values, dict) else []
    return _in_range(found[0]) if found else NO_LABEL


def _in_range(label: int) -> int:
    if not 0 <= label < MOST_CLASSES:
        raise _Faulty(f"labels outside 0 .. {MOST_CLASSES - 1}")
    return label
