"""Where the captions of a set come from: kept when it was prepared, in the shards of others, or made of its classes' names."""

import json
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.data.arrays import retried
from fasttrain.data.columns import read_column
from fasttrain.data.config import DataConfig
from fasttrain.data.files import LocalFiles, ShardFiles
from fasttrain.data.foreign.opening import Foreign, open_parts
from fasttrain.data.foreign.parts import Part
from fasttrain.data.foreign.pattern import pattern_of
from fasttrain.data.foreign.samples import Sample
from fasttrain.data.foreign.unchanged import Changed, IndexedShard, remedied
from fasttrain.data.index import CAPTIONS_FILE, LABELS_FILE, Index, read_index
from fasttrain.data.text.captions import DEFAULT_TEMPLATE, NoCaption, caption_in, class_names, of_classes
from fasttrain.data.text.made_of import MadeOf
from fasttrain.errors import UserError
from fasttrain.files import digest


class Captioned(NamedTuple):
    """The samples of a set with their captions.

    Attributes:
        digests_xxh3: of the set's index: which samples these are, in which order.
        captions: one a sample; "" for none.
        told: where they come from, for people.
        made_of: the same, for the set to be compared with later.
    """

    digests_xxh3: str
    captions: list[str]
    told: str
    made_of: MadeOf


def captions_of(place: str, template: str | None = None, names: Path | None = None) -> Captioned:
    """The captions of a set: its images' own, or where it has none, or a template or names are given, those of its classes.

    Args:
        place: folder of a prepared set, or a pattern or folder of WebDataset shards.
        template: a caption with {} for the class's name.
        names: file with the words of each class; without it the folders' names are taken.

    Raises:
        UserError: no such set, no captions and no classes, captions that are damaged or not what was indexed, or a template or names that
            do not fit.
    """
    pattern = pattern_of(place)
    of_names = template is not None or names is not None
    if pattern is None:
        return _of_prepared(Path(place), of_names, template, names)
    config = DataConfig(train=place)
    found = open_parts(pattern, config, lambda: None)
    made_of = MadeOf.of(found.captions_xxh3, found.labels_xxh3, found.classes, of_names)
    with closing(found.files), remedied(found.folder):
        if of_names:
            return Captioned(found.digests_xxh3, *_of_classes(found.classes, found.labels, template, names, place), made_of)
        captions = _of_shards(found, config.retry_seconds)
    if not any(captions):
        raise UserError(f"{place}: not one caption in these shards; give --template (and --class-names) to make them of the classes")
    return Captioned(found.digests_xxh3, captions, "captions of the shards' txt and json members", made_of)


def _of_prepared(folder: Path, of_names: bool, template: str | None, names: Path | None) -> Captioned:
    index = read_index(folder)
    made_of = MadeOf.of(index.captions_xxh3, index.labels_xxh3, index.classes, of_names)
    if index.captions_xxh3 is not None and not of_names:
        return Captioned(index.digests_xxh3, _kept(folder, index), "captions kept with the images", made_of)
    labels = read_column(LocalFiles(folder), LABELS_FILE, index.labels_xxh3, np.int64, (index.samples,))
    return Captioned(index.digests_xxh3, *_of_classes(index.classes, labels, template, names, str(folder)), made_of)


def _kept(folder: Path, index: Index) -> list[str]:
    path = folder / CAPTIONS_FILE
    if not path.is_file() or digest(path) != index.captions_xxh3:
        told = "missing" if not path.is_file() else "its content is not what was prepared"
        raise UserError(f"{path}: {told}; restore the file, or run the same `fasttrain prepare` command again")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) or "" for line in lines]


def _of_classes(classes: Sequence[str], labels: np.ndarray, template: str | None, names: Path | None, place: str) -> tuple[list[str], str]:
    """The caption of each sample's class, and where they come from."""
    if not classes:
        raise UserError(f"{place}: has neither captions nor classes; prepare it with --captions txt or json")
    words = class_names(names, classes) if names else classes
    chosen = DEFAULT_TEMPLATE if template is None else template
    made = of_classes(words, chosen)
    return [made[label] for label in labels.tolist()], f"{len(classes)} class names in {chosen!r}"


def _of_shards(found: Foreign, retry_seconds: float) -> list[str]:
    """The caption of each sample of shards made elsewhere, read shard after shard. Raises Changed."""
    captions: list[str] = []
    for name, part in found.parts.items():
        captions += retried(f"{found.files.place}/{name}", retry_seconds, partial(_in_shard, found.files, name, part))
        if not isinstance(found.files, LocalFiles):
            found.files.release(name)
    return captions


def _in_shard(files: ShardFiles, name: str, part: Part) -> list[str]:
    """The captions of a shard. A copy in a cache that is not what was indexed is fetched anew; raises Changed where that is no other."""
    told = f"{files.place}/{name}"
    while True:
        try:
            path = files.path(name)
        except FileNotFoundError:
            raise Changed(f"{told}: missing") from None
        try:
            with IndexedShard(path, told) as shard:
                shard.check_size(part.bytes)
                return [_caption_of(shard, sample) for sample in part.rows()]
        except Changed:
            if not files.renew(name):
                raise


def _caption_of(shard: IndexedShard, sample: Sample) -> str:
    """The caption of a sample; "" where there is none."""
    if not sample.text_offset:
        return ""
    content = shard.read("caption", sample.text_offset, sample.text_size, sample.text_digest)
    try:
        return caption_in(content, "json" if sample.text_is_json else "txt")
    except NoCaption:
        return ""
