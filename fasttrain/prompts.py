"""The captions that a run can always be shown with: the empty one and the first of its training set, kept in the run's own folder.

    RUN/text.safetensors    tokens float16 [1 + n, M, E], length int64 [1 + n], pooled float16 [1 + n, P]; row 0 is the empty caption;
                            in its metadata the captions and the encoder's record, as JSON

So sampling needs neither the training set nor the encoder; other prompts need the encoder that the run was trained with.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from fasttrain.cond import Text
from fasttrain.data.index import TextRecord
from fasttrain.data.text.captions import clean
from fasttrain.data.text.encoder import EncoderRecord, TextEncoder
from fasttrain.data.text.table import TextTable
from fasttrain.errors import UserError
from fasttrain.tensor_file import write_tensors

PROMPTS_FILE = "text.safetensors"
_BATCH = 64
_PARTS = ("tokens", "length", "pooled")


class Prompts(NamedTuple):
    """What a run keeps of its text.

    Attributes:
        record: the encoder, and the text that the run was trained with.
        empty: the empty caption, B = 1, as stored: not padded.
        captions: the others.
        text: of these, B = n, as stored.
    """

    record: TextRecord
    empty: Text
    captions: tuple[str, ...]
    text: Text


def write_prompts(run_dir: Path, table: TextTable) -> None:
    """Writes a run's prompts, whole or not at all. Raises UserError where there is no room."""
    text = table.texts(np.arange(len(table.head) + 1))
    metadata = {"captions": json.dumps(table.head), "record": table.record.model_dump_json()}
    try:
        write_tensors(run_dir / PROMPTS_FILE, dict(zip(_PARTS, (text.tokens, text.length, text.pooled), strict=True)), metadata)
    except OSError as error:
        told = f"{run_dir / PROMPTS_FILE}: cannot be written: {error.strerror}"
        raise UserError(f"{told}; make room and run the same command again") from None


def read_prompts(run_dir: Path) -> Prompts:
    """A run's prompts, on the host.

    Raises:
        UserError: missing or damaged.
    """
    path = run_dir / PROMPTS_FILE
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tokens, length, pooled = (file.get_tensor(name) for name in _PARTS)
        captions = tuple(map(str, json.loads(metadata["captions"])))
        record = TextRecord.model_validate_json(metadata["record"])
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so the run keeps no captions; restore the file, or start the run's training again") from None
    except (SafetensorError, KeyError, ValueError, ValidationError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file, or start the run's training again") from None
    if tokens.shape != (len(captions) + 1, record.tokens, record.width) or pooled.shape != (len(captions) + 1, record.pooled):
        raise UserError(f"{path}: its tensors are not of the shapes that it says; restore the file, or start the run's training again")
    return Prompts(record, Text(tokens[:1], length[:1], pooled[:1]), captions, Text(tokens[1:], length[1:], pooled[1:]))


def encoded(prompts: Sequence[str], encoder: str, revision: str | None, record: TextRecord) -> Text:
    """Other prompts through the encoder that a run was trained with: as stored text, on the host.

    Args:
        prompts: captions.
        encoder, revision: folder or hub id with its commit, see `TextEncoder.load`.
        record: of the run's prompts.

    Raises:
        UserError: another encoder than the run's, or a prompt of more than its M tokens: here a cut would go unseen.
    """
    loaded = TextEncoder.load(encoder, revision, option="--text-encoder")
    _check_same(encoder, loaded.record, record)
    batches = (prompts[first : first + _BATCH] for first in range(0, len(prompts), _BATCH))
    rows = [each for batch in batches for each in loaded.encode([clean(prompt) for prompt in batch])]
    for prompt, row in zip(prompts, rows, strict=True):
        if row.uncut > record.tokens:
            raise UserError(f"prompt {prompt!r}: {row.uncut} tokens, where the run's captions have {record.tokens} at most; shorten it")
    tokens = np.zeros((len(rows), record.tokens, record.width), np.float16)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row.tokens)] = row.tokens
    length = torch.tensor([len(row.tokens) for row in rows])
    return Text(torch.from_numpy(tokens), length, torch.from_numpy(np.stack([row.pooled for row in rows])))


def _check_same(given: str, own: EncoderRecord, wanted: TextRecord) -> None:
    """Raises UserError where an encoder is not the one of a run."""
    shapes = [f"tokens of {record.width}, pooled {record.pooled}" for record in (own, wanted)]
    if own.xxh3 != wanted.xxh3:
        told = f"its weights or words ({shapes[0]}) are not those of the run's encoder {wanted.id} ({shapes[1]})"
        raise UserError(f"--text-encoder {given}: {told}; give the encoder that the run's text was prepared with")
