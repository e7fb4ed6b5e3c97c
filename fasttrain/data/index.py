"""What a folder of shards holds: `index.json`, read strictly, because everything after it trusts its offsets.

    index.json      format, kind, shapes, classes, source, VAE, and each shard's size, digest, first offset and stride
    labels.npy      int64 [samples], in the order of the sample_ids
    digests.npy     uint64 [samples], xxh3 of each sample's array: what a damaged shard still holds is known by them
    facts.npy       float32 [samples, facts], what was recorded of each image; see facts.py
    captions.jsonl  where the images came with captions: one JSON string a sample, null where an image had none
    shard-00000.tar ...

Samples of a set all have one shape, and webdataset's writer stores a sample as `KEY.cls` and then `KEY.npy`, each padded to the tar's
512 bytes. So a shard's arrays lie at `offset + row * stride`, and an index of two numbers a shard is an index of every sample.

Shards made elsewhere (layout "members") have the same index, made at first use; where their samples lie is kept apart, see `foreign`.
"""

import math
from pathlib import Path
from typing import Literal, Self

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fasttrain.data.files import LocalFiles, ShardFiles
from fasttrain.errors import UserError

FORMAT = 3
INDEX_FILE = "index.json"
LABELS_FILE = "labels.npy"
DIGESTS_FILE = "digests.npy"
FACTS_FILE = "facts.npy"
CAPTIONS_FILE = "captions.jsonl"
# What numpy writes before the arrays of this project: magic, version, a dictionary, padded to 64.
NPY_HEADER = 128
DIGEST = r"^[0-9a-f]{32}$"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Strict):
    """One tar: its name, samples and size in bytes, its digest, and where its arrays lie (bytes)."""

    file: str = Field(pattern=r"^[A-Za-z0-9_][^/\\\x00-\x1f]*$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    xxh3: str = Field(pattern=DIGEST)
    offset: int = Field(ge=0)
    stride: int = Field(ge=0)


class Source(_Strict):
    """Where the samples came from: a name, and the digest of the sorted listing (class, file, size)."""

    name: str
    xxh3: str = Field(pattern=DIGEST)


class VaeRecord(_Strict):
    """Which autoencoder made the latents: a hub id with its revision, or a folder's name with the digest of its content."""

    id: str
    revision: str | None = None
    xxh3: str | None = Field(default=None, pattern=DIGEST)
    scaling_factor: float
    shift_factor: float = 0.0


class TextRecord(_Strict):
    """Which text encoder made a set's text, and what it made.

    Attributes:
        id: the encoder's hub id, with its revision, or the name of its folder, with the digest of its content (xxh3).
        tokens: M, places of a caption.
        width: E, of a token.
        pooled: P, of the pooled vector.
        text_xxh3: digest of all of the text: runs with the same one read the same.
    """

    id: str
    revision: str | None = None
    xxh3: str | None = Field(default=None, pattern=DIGEST)
    tokens: int = Field(ge=1)
    width: int = Field(ge=1)
    pooled: int = Field(ge=1)
    text_xxh3: str = Field(pattern=DIGEST)


class Index(_Strict):
    """The content of `index.json`.

    shape is one sample's: [C, H, W] of a uint8 image, or [views, 2, C, h, w] of latents: plain and flipped view, mean and log-variance.
    latent_shift and latent_scale [C] make the latents' channels zero-mean and unit-variance: x0 = (z - shift) * scale.
    pixels is the side of the square image, before an autoencoder; facts names the columns of facts.npy.
    text is set in a run's own copy alone, where the run reads text: it says which.
    """

    format: int
    layout: Literal["arrays", "members"] = "arrays"
    kind: Literal["image", "latent"]
    samples: int = Field(ge=1)
    rejected: int = Field(ge=0)
    shape: tuple[int, ...] = Field(min_length=3, max_length=5, strict=False)
    dtype: Literal["uint8", "float16", "float32"]
    classes: tuple[str, ...] = Field(strict=False)
    num_classes: int = Field(ge=0)
    source: Source
    labels_xxh3: str = Field(pattern=DIGEST)
    digests_xxh3: str = Field(pattern=DIGEST)
    pixels: int = Field(ge=1)
    facts: tuple[str, ...] = Field(default=(), strict=False)
    facts_xxh3: str | None = Field(default=None, pattern=DIGEST)
    captions_xxh3: str | None = Field(default=None, pattern=DIGEST)
    vae: VaeRecord | None = None
    text: TextRecord | None = None
    latent_shift: tuple[float, ...] | None = Field(default=None, strict=False)
    latent_scale: tuple[float, ...] | None = Field(default=None, strict=False)
    shards: tuple[Shard, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.num_classes != len(self.classes):
            raise ValueError(f"num_classes is {self.num_classes}, but {len(self.classes)} classes are named")
        if self.samples != sum(shard.samples for shard in self.shards):
            raise ValueError("the shards' samples do not add up to `samples`")
        if len(set(self.facts)) != len(self.facts) or (self.facts_xxh3 is None) != (not self.facts):
            raise ValueError("facts are named once each, and facts_xxh3 goes with them")
        self._check_kind()
        for shard in self.shards if self.layout == "arrays" else ():
            last = shard.offset + (shard.samples - 1) * shard.stride + self.sample_bytes
            if shard.samples and (shard.offset < NPY_HEADER or last > shard.bytes or shard.stride < self.sample_bytes):
                raise ValueError(f"{shard.file}: its samples do not lie inside its {shard.bytes} bytes")
        return self

    def _check_kind(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"shape {list(self.shape)} is empty")
        if self.kind == "image" and (len(self.shape) != 3 or self.dtype != "uint8"):
            raise ValueError("images are uint8 of [C, H, W]")
        if self.kind == "latent":
            scales = (self.latent_shift, self.latent_scale)
            if len(self.shape) != 5 or self.shape[:2] != (2, 2) or self.dtype == "uint8" or self.vae is None:
                raise ValueError("latents are float16 or float32 of [2 views, 2, C, h, w], with their VAE")
            if any(s is None or len(s) != self.shape[2] or not all(map(math.isfinite, s)) for s in scales):
                raise ValueError("latents need a finite latent_shift and latent_scale for each channel")

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's array, without the npy and tar headers."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def x0_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what the model sees."""
        return self.shape[-3:]  # type: ignore[return-value]

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard, in order: what data.order needs to know."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def xxh3(self) -> str:
        """Digest of all of it: which set this is, wherever it lies."""
        return xxhash.xxh3_128_hexdigest(self.model_dump_json().encode())


def read_index(folder: Path) -> Index:
    """The index of a folder of shards, validated.

    Raises:
        UserError: no such folder, no index in it, not JSON, another format version, or contents that contradict each other.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards; make one with `fasttrain prepare digits|images|latents`")
    return index_of(LocalFiles(folder))


def index_of(files: ShardFiles) -> Index:
    """The index among a set's files, validated. Raises UserError as `read_index`."""
    path = f"{files.place}/{INDEX_FILE}"
    try:
        text = files.path(INDEX_FILE).read_bytes()
    except FileNotFoundError:
        told = "missing, so this is no finished set of shards; run (or finish) `fasttrain prepare` for this folder"
        raise UserError(f"{path}: {told}") from None
    version = _version(path, text)
    if version != FORMAT:
        raise UserError(f"{path}: format {version}, but this fasttrain reads format {FORMAT}; prepare the set again")
    try:
        return Index.model_validate_json(text)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'index'}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {told}; the file was changed or damaged: prepare the set again") from None


def _version(path: str, text: bytes) -> object:
    """The format number alone, so that another version is told as such and not as a list of unknown keys."""

    class Head(BaseModel):
        format: object = None

    try:
        return Head.model_validate_json(text).format
    except ValidationError:
        raise UserError(f"{path}: not a JSON object; the file was changed or damaged: prepare the set again") from None
