"""What a run keeps of its text: written and read back, and other prompts only through the run's own encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fasttrain.data.config import DataConfig
from fasttrain.data.index import read_index
from fasttrain.data.text.encoder import TextEncoder
from fasttrain.data.text.table import TextTable
from fasttrain.errors import UserError
from fasttrain.prompts import PROMPTS_FILE, encoded, read_prompts, write_prompts
from tests.data.conftest import encoder, encoder_folder, prepared_digits, prepared_text  # noqa: F401 (fixtures)
from tests.data.text.tiny_encoder import write_tiny_encoder
from tests.disks import fill


@pytest.fixture
def table(prepared_text: Path, prepared_digits: Path) -> TextTable:  # noqa: F811
    return TextTable.open(str(prepared_text), read_index(prepared_digits), DataConfig(train=str(prepared_digits)))


@pytest.fixture
def run_dir(table: TextTable, tmp_path: Path) -> Path:
    write_prompts(tmp_path, table)
    return tmp_path


def test_they_are_read_as_they_were_written(run_dir: Path, table: TextTable):
    prompts = read_prompts(run_dir)
    assert prompts.captions == table.head and len(prompts.captions) == 10 and prompts.record == table.record
    for given, wanted in ((prompts.empty, table.empty), (prompts.text, table.texts(np.arange(1, 11)))):
        for part in ("tokens", "length", "pooled"):
            assert (getattr(given, part) == getattr(wanted, part)).all()
    assert [path.name for path in run_dir.iterdir()] == [PROMPTS_FILE]


def test_no_room_for_them_is_told_as_that(table: TextTable, disk):
    folder = disk(1 << 20)
    fill(folder, leave=1 << 12)
    with pytest.raises(UserError, match=r"text.safetensors: cannot be written: No space left on device; make room and run"):
        write_prompts(folder, table)


def test_the_runs_own_encoder_gives_the_tables_text(run_dir: Path, encoder_folder: Path):  # noqa: F811
    prompts = read_prompts(run_dir)
    text = encoded([f"  {prompts.captions[4]} "], str(encoder_folder), None, prompts.record)
    assert text.tokens.shape == (1, 32, 32) and text.tokens.dtype == prompts.text.tokens.dtype and text.length.tolist() == [5]
    # fp32 depends on the batch's shape in its last bits: one float16 step at most.
    for part in ("tokens", "pooled"):
        np.testing.assert_allclose(getattr(text, part)[0], getattr(prompts.text, part)[4], rtol=2**-10, atol=1e-4)


def test_other_encoders_and_long_prompts_are_refused(run_dir: Path, encoder_folder: Path, tmp_path: Path):  # noqa: F811
    record = read_prompts(run_dir).record
    wide = write_tiny_encoder(tmp_path / "wide", hidden=48)
    with pytest.raises(UserError, match=r"\S+wide: .*tokens of 48, pooled 24.* run's encoder tiny-clip \(tokens of 32, pooled 24\)"):
        encoded(["x"], str(wide), None, record)
    other = write_tiny_encoder(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"other: its weights or words .*; give the encoder that the run's text was prepared with"):
        encoded(["x"], str(other), None, record)
    with pytest.raises(UserError, match=r"--text-encoder nowhere: no such folder"):
        encoded(["x"], "nowhere", None, record)
    with pytest.raises(UserError, match=r"prompt 'zzz.*': 82 tokens, where the run's captions have 32 at most"):
        encoded(["seven", "z" * 80], str(encoder_folder), None, record)


def test_a_run_of_shorter_captions_takes_no_longer_prompt(encoder_folder: Path, run_dir: Path):  # noqa: F811
    short = TextEncoder.load(str(encoder_folder), max_tokens=6).record
    record = read_prompts(run_dir).record.model_copy(update={"tokens": short.tokens})
    assert encoded(["one two three four"], str(encoder_folder), None, record).tokens.shape == (1, 6, 32)
    with pytest.raises(UserError, match="7 tokens, where the run's captions have 6 at most"):
        encoded(["one two three four five"], str(encoder_folder), None, record)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "missing, so the run keeps no captions"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
        (lambda path: save_file(load_file(path), path), "cannot be read .'captions'"),
        (lambda path: save_file(load_file(path), path, {"captions": "[]", "record": "{}"}), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"the digit 3", b"the digit\\u")), "cannot be read"),
    ],
)
def test_what_is_missing_or_damaged_is_told(run_dir: Path, damage, told: str):
    damage(run_dir / PROMPTS_FILE)
    with pytest.raises(UserError, match=rf"{PROMPTS_FILE}: {told}"):
        read_prompts(run_dir)


def test_tensors_of_other_shapes_than_the_record_says(run_dir: Path, table: TextTable):
    path = run_dir / PROMPTS_FILE
    save_file(load_file(path), path, {"captions": json.dumps(["only one"]), "record": table.record.model_dump_json()})
    with pytest.raises(UserError, match="not of the shapes that it says"):
        read_prompts(run_dir)
