"""The text of a set: every distinct caption once, as its encoder gave it, and which of them each sample has.

    text.json          the encoder, the samples that it belongs to, and each part's size and digests
    rows.npy           int64 [samples], the number of each sample's caption; 0 is the empty caption
    first.npy          int64 [captions + 1], the first token of each caption, counted over all parts
    tokens-00000.npy   float16 [tokens of the part, E] ...
    pooled-00000.npy   float16 [captions of the part, P] ...
    captions.jsonl     the captions by their numbers, one JSON string a line: for people, not read in training

Captions stand in the order in which the samples first use them, so text is read as locally as the shards. Only a caption's own tokens are
stored. Files are verified when they are first touched, and then read in place. What is damaged stops the run: another caption in its place
would be wrong in silence.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fasttrain.cond import Text
from fasttrain.data.arrays import REMEDY, mapped_digest, npy_header, retried
from fasttrain.data.columns import read_column
from fasttrain.data.config import DataConfig
from fasttrain.data.files import ShardFiles
from fasttrain.data.holding import Holding
from fasttrain.data.index import DIGEST, NPY_HEADER, Index, TextRecord
from fasttrain.data.remote.store import open_files
from fasttrain.data.text.encoder import EncoderRecord
from fasttrain.data.text.made_of import MadeOf
from fasttrain.errors import UserError

FORMAT = 2
TEXT_FILE, ROWS_FILE, FIRST_FILE, CAPTIONS_FILE = "text.json", "rows.npy", "first.npy", "captions.jsonl"
OWN_FOLDER = "text"  # inside a set
DTYPE = np.dtype(np.float16)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Part(_Strict):
    """Captions whose text lies in one pair of files: how many, their tokens, and the files' digests."""

    captions: int = Field(ge=1)
    tokens: int = Field(ge=1)
    tokens_xxh3: str = Field(pattern=DIGEST)
    pooled_xxh3: str = Field(pattern=DIGEST)


class TextIndex(_Strict):
    """The content of `text.json`.

    Attributes:
        samples, digests_xxh3: of the set's index: whose captions these are, in which order.
        made_of: what of the set decided the captions.
        without: samples that have no caption, and so the empty one.
        cut: captions longer than M; longest: tokens of the longest, before it was cut.
        head: the first captions behind the empty one.
        mean, std: of each channel, over the tokens of all captions.
    """

    format: int
    encoder: EncoderRecord
    samples: int = Field(ge=1)
    digests_xxh3: str = Field(pattern=DIGEST)
    made_of: MadeOf
    captions: int = Field(ge=1)
    without: int = Field(ge=0)
    cut: int = Field(ge=0)
    longest: int = Field(ge=1)
    rows_xxh3: str = Field(pattern=DIGEST)
    first_xxh3: str = Field(pattern=DIGEST)
    captions_xxh3: str = Field(pattern=DIGEST)
    head: tuple[str, ...] = Field(strict=False)
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[float, ...] = Field(strict=False)
    parts: tuple[Part, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.captions != sum(part.captions for part in self.parts):
            raise ValueError("the parts' captions do not add up to `captions`")
        if {len(self.mean), len(self.std)} != {self.encoder.width}:
            raise ValueError("mean and std have a number for each channel")
        return self


def part_names(number: int) -> tuple[str, str]:
    """The files of a part: tokens and pooled."""
    return f"tokens-{number:05d}.npy", f"pooled-{number:05d}.npy"


class TextTable:
    """The text of a set, by sample_id. Any number of threads may gather at once.

    Args:
        files: where it lies.
        text: what it is.
        xxh3: digest of `text.json`, and so of everything.
        rows, first: its columns.
        config: `verify` and `retry_seconds` are looked at.

    Attributes:
        record: the encoder, the shapes M, E and P, and `text_xxh3`.
        captions: distinct ones, the empty one included.
        head: the first of them behind the empty one: numbers 1, 2 ...
    """

    def __init__(self, files: ShardFiles, text: TextIndex, xxh3: str, rows: np.ndarray, first: np.ndarray, config: DataConfig):
        self.files = files
        self.record = TextRecord(**text.encoder.model_dump(), text_xxh3=xxh3)
        self.captions, self.head = text.captions, text.head
        self._rows, self._first, self._parts = rows, first, text.parts
        self._verify, self._retry_seconds = config.verify, config.retry_seconds
        self._part_first = np.concatenate([[0], np.cumsum([part.captions for part in text.parts])])
        self._names = [name for number in range(len(text.parts)) for name in part_names(number)]
        sizes = [NPY_HEADER + int(np.prod(self._shape(file))) * DTYPE.itemsize for file in range(len(self._names))]
        self._held = Holding(files, self._names, sizes, self._open)

    @classmethod
    def open(cls, place: str, index: Index, config: DataConfig) -> "TextTable":
        """The text at a place.

        Args:
            place: folder that `fasttrain prepare text` wrote, or its URL.
            index: of the set whose text it must be.
            config: how to read it.

        Raises:
            UserError: nothing there, damaged, of another format, of another set, or of captions or labels that the set had once.
        """
        files = open_files(place, config, (TEXT_FILE, ROWS_FILE, FIRST_FILE))
        text, xxh3 = _read(files)
        if (text.samples, text.digests_xxh3) != (index.samples, index.digests_xxh3):
            told = f"belongs to another set ({text.samples:,} samples there, {index.samples:,} here, or in another order)"
            raise UserError(f"{files.place}: {told}; run `fasttrain prepare text` for this set")
        if why := text.made_of.changed(index):
            raise UserError(f"{files.place}: is of the set as it was: {why}; delete it and run `fasttrain prepare text` again")
        rows = read_column(files, ROWS_FILE, text.rows_xxh3, np.int64, (text.samples,))
        first = read_column(files, FIRST_FILE, text.first_xxh3, np.int64, (text.captions + 1,))
        return cls(files, text, xxh3, rows, first, config)

    @property
    def empty(self) -> Text:
        """The empty caption: B = 1, float16, on the host."""
        return self.texts(np.zeros(1, np.int64))

    def texts(self, numbers: np.ndarray) -> Text:
        """Captions by their numbers, on the host."""
        return Text(*map(torch.from_numpy, self._read(np.asarray(numbers, np.int64))))

    def gather(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The text of these samples, in new memory.

        Args:
            sample_ids: int64 [n], in [0, samples).

        Returns:
            Tokens float16 [n, M, E] with zeros behind each caption's own, their number int64 [n], and pooled float16 [n, P].

        Raises:
            IndexError: an id outside the set.
            UserError: a file that is missing or damaged, or a passing failure that lasted too long.
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self._rows)):
            raise IndexError(f"sample ids must lie in [0, {len(self._rows)}); got {ids.min()} to {ids.max()}")
        return self._read(self._rows[ids])

    def ahead(self, spans: Iterable[tuple[int, int]]) -> None:
        """Says which samples' text is wanted next, as (first, stop) of their ids, most urgent first; returns at once."""
        parts: dict[int, None] = {}
        for first, stop in spans:
            parts |= dict.fromkeys(np.unique(self._part_of(self._rows[first:stop])).tolist())
        self.files.ahead([name for part in parts for name in part_names(part)])

    def close(self) -> None:
        """Ends what fetches ahead."""
        self.files.close()

    def _read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        record = self.record
        tokens = np.zeros((len(numbers), record.tokens, record.width), DTYPE)
        pooled = np.empty((len(numbers), record.pooled), DTYPE)
        length = self._first[numbers + 1] - self._first[numbers]
        of = self._part_of(numbers)
        for part in np.unique(of).tolist():
            places = np.flatnonzero(of == part)
            before = self._part_first[part]
            starts = self._first[numbers[places]] - self._first[before]
            with self._held.use(2 * part) as states, self._held.use(2 * part + 1) as vectors:
                # Slices, one by one: an index over all tokens at once copies each of them twice.
                for place, start, count in zip(places.tolist(), starts.tolist(), length[places].tolist(), strict=True):
                    tokens[place, :count] = states[start : start + count]
                pooled[places] = vectors[numbers[places] - before]
        return tokens, length, pooled

    def _part_of(self, numbers: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._part_first, numbers, side="right") - 1

    def _shape(self, file: int) -> tuple[int, int]:
        part = self._parts[file // 2]
        return (part.captions, self.record.pooled) if file % 2 else (part.tokens, self.record.width)

    def _open(self, file: int) -> np.ndarray:
        return retried(f"{self.files.place}/{self._names[file]}", self._retry_seconds, lambda: self._opened(file))

    def _opened(self, file: int) -> np.ndarray:
        """A file of a part, mapped and verified."""
        name = self._names[file]
        while True:
            try:
                path = self.files.path(name)
            except FileNotFoundError:
                self.files.path(TEXT_FILE)  # gone as well: a disk was lost, which may pass
                raise UserError(f"{self.files.place}/{name}: missing; {REMEDY}") from None
            why = self._fault(path, file)
            if why is None:
                return np.memmap(path, DTYPE, "r", NPY_HEADER, self._shape(file))
            if not self.files.renew(name):
                raise UserError(f"{self.files.place}/{name}: {why}; {REMEDY}")

    def _fault(self, path: Path, file: int) -> str | None:
        """What of this file is not as it was prepared."""
        header = npy_header(self._shape(file), DTYPE.name)
        size, wanted = path.stat().st_size, NPY_HEADER + int(np.prod(self._shape(file))) * DTYPE.itemsize
        if size != wanted:
            return f"{'cut short' if size < wanted else 'longer than it was'}: {size} of {wanted} bytes"
        part = self._parts[file // 2]
        if self._verify and mapped_digest(path) != (part.pooled_xxh3 if file % 2 else part.tokens_xxh3):
            return "its content is not what was prepared"
        with path.open("rb") as content:
            return None if content.read(NPY_HEADER) == header else "holds no array of the shape that text.json says"


def _read(files: ShardFiles) -> tuple[TextIndex, str]:
    """`text.json`, validated, and its digest."""
    path = f"{files.place}/{TEXT_FILE}"
    try:
        content = files.path(TEXT_FILE).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so there is no finished text; run (or finish) `fasttrain prepare text` for this set") from None
    try:
        text = TextIndex.model_validate_json(content)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'text'}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {told}; the file was changed, damaged, or is of another fasttrain: prepare the text again") from None
    if text.format != FORMAT:
        raise UserError(f"{path}: format {text.format}, but this fasttrain reads format {FORMAT}; prepare the text again")
    return text, xxhash.xxh3_128_hexdigest(content)
