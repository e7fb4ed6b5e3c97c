"""The text encoder against transformers' own outputs, what its record says, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.data.text.encoder import TextEncoder
from fasttrain.errors import UserError
from tests.data.text.tiny_encoder import write_tiny_encoder, write_tokenizer

CAPTIONS = ["", "a photo of seven", "a handwritten digit zebra!", "nine"]


def test_tokens_and_pooled_are_transformers_own(encoder_folder: Path, encoder: TextEncoder):
    """As float16 of its fp32 outputs at the full length of 32 places; a batch of another shape moves fp32 by far less than half a step."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    model = CLIPTextModelWithProjection.from_pretrained(encoder_folder)
    given = CLIPTokenizer.from_pretrained(encoder_folder)(CAPTIONS, padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**given)
    for row, each in enumerate(encoder.encode(CAPTIONS)):
        length = int(given["attention_mask"][row].sum())
        assert each.tokens.shape == (length, 32) and each.tokens.dtype == each.pooled.dtype == np.float16 and each.uncut == length
        np.testing.assert_allclose(each.tokens, wanted.last_hidden_state[row, :length].numpy(), rtol=2**-10, atol=1e-4)
        np.testing.assert_allclose(each.pooled, wanted.text_embeds[row].numpy(), rtol=2**-10, atol=1e-4)


def test_the_empty_caption_is_its_two_marks_and_words_are_tokens(encoder: TextEncoder):
    assert [each.uncut for each in encoder.encode(["", "seven", "the digit seven"])] == [2, 3, 5]


def test_without_a_projection_pooled_is_the_end_marks_state(tmp_path: Path):
    encoder = TextEncoder.load(str(write_tiny_encoder(tmp_path / "plain", projection=None)))
    assert encoder.record.pooled == encoder.record.width == 32
    for each in encoder.encode(CAPTIONS):
        np.testing.assert_array_equal(each.pooled, each.tokens[-1])


def test_what_is_longer_is_cut_and_keeps_its_end_mark(encoder_folder: Path, encoder: TextEncoder):
    short = TextEncoder.load(str(encoder_folder), max_tokens=6)
    cut, fits = short.encode(["one two three four five six", "one two three four"])
    assert (cut.uncut, len(cut.tokens), fits.uncut, len(fits.tokens)) == (8, 6, 6, 6)
    np.testing.assert_array_equal(cut.tokens, fits.tokens)
    assert short.record.tokens == 6 and short.record.xxh3 == encoder.record.xxh3
    long = encoder.encode(["z" * 200])[0]
    assert long.uncut == 202 and len(long.tokens) == 32


def test_the_record_is_of_the_content_not_of_the_place(encoder_folder: Path, encoder: TextEncoder, tmp_path: Path):
    record = encoder.record
    assert (record.id, record.revision, record.tokens, record.width, record.pooled) == ("tiny-clip", None, 32, 32, 24)
    moved = Path(shutil.copytree(encoder_folder, tmp_path / "tiny-clip"))
    assert TextEncoder.load(str(moved)).record == record
    write_tiny_encoder(moved, seed=1)
    assert TextEncoder.load(str(moved)).record.xxh3 != record.xxh3
    write_tiny_encoder(moved)
    assert TextEncoder.load(str(moved)).record == record
    write_tokenizer(moved, ("other", "words", "photo", "of", "the", "digit", "handwritten", "zero", "one", "two", "three", "four"))
    assert TextEncoder.load(str(moved)).record.xxh3 != record.xxh3


@pytest.mark.parametrize(
    ("name", "revision", "told"),
    [
        ("nowhere/at/all", None, r"--encoder nowhere/at/all: no such folder, nor a hub id .* give the folder of a CLIP text encoder"),
        ("owner/name", None, r"owner/name: no such folder here; as a hub id it needs --encoder-revision"),
        ("owner/name", "main", r"'main'\), because a branch may change"),
    ],
)
def test_unknown_encoders(name: str, revision: str | None, told: str):
    with pytest.raises(UserError, match=told):
        TextEncoder.load(name, revision)


def damaged_copy(folder: Path, tmp_path: Path, kind: str) -> Path:
    """An encoder with something wrong."""
    folder = Path(shutil.copytree(folder, tmp_path / "broken"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "no tokenizer":
        (folder / "vocab.json").unlink()
    elif kind == "damaged tokenizer":
        (folder / "vocab.json").write_text("{")
    elif kind == "pickled":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif kind == "half of the weights":
        from safetensors.torch import load_file, save_file

        save_file(dict(list(load_file(weights).items())[:5]), weights, {"format": "pt"})
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "another model":
        config.write_text(json.dumps({"model_type": "t5", "architectures": ["T5EncoderModel"]}))
    elif kind == "another vocabulary":
        write_tokenizer(folder, [f"word{n}" for n in range(200)])
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("no tokenizer", r"no tokenizer in it \(tokenizer.json, or vocab.json and merges.txt\); copy"),
        ("damaged tokenizer", "its tokenizer cannot be read"),
        ("pickled", "not a CLIP text encoder with its tokenizer, in safetensors"),
        ("half of the weights", r"its weights lack \d+ tensors"),
        ("cut weights", "not a CLIP text encoder"),
        ("another model", "its config names T5EncoderModel; give a CLIP text encoder"),
        ("another vocabulary", r"its tokenizer has \d+ words, its weights \d+"),
        ("empty", "not a CLIP text encoder"),
    ],
)
def test_folders_that_are_no_encoder(encoder_folder: Path, tmp_path: Path, kind: str, told: str):
    with pytest.raises(UserError, match=rf"--encoder \S+broken: .*{told}"):
        TextEncoder.load(str(damaged_copy(encoder_folder, tmp_path, kind)))


@pytest.mark.parametrize("most", [2, 33])
def test_max_tokens_must_fit_the_encoder(encoder_folder: Path, most: int):
    with pytest.raises(UserError, match=rf"--max-tokens {most}: --encoder \S+tiny-clip takes 3 to 32"):
        TextEncoder.load(str(encoder_folder), max_tokens=most)


def test_states_that_are_not_finite_are_refused(encoder_folder: Path):
    encoder = TextEncoder.load(str(encoder_folder))
    next(p for name, p in encoder.model.named_parameters() if "final_layer_norm.bias" in name).data[3] = 1e6  # beyond fp16
    with pytest.raises(UserError, match="not finite in float16"):
        encoder.encode(["seven"])


def test_without_transformers_the_extra_is_named(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # what an absent package looks like to import
    with pytest.raises(UserError, match=r"pip install 'fasttrain\[text\]'"):
        TextEncoder.load(str(encoder_folder))


def test_a_folders_own_python_is_never_run(encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers offers to run it, and takes a "y" typed in advance for consent."""
    strange = tmp_path / "strange"
    shutil.copytree(encoder_folder, strange)
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "planted.Planted"}, "architectures": ["CLIPTextModel"]}
    (strange / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (strange / "planted.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import CLIPTextConfig\n\n\nclass Planted(CLIPTextConfig):\n    pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(UserError, match="not a CLIP text encoder"):
        TextEncoder.load(str(strange))
    assert not ran.exists()


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "gelu"), ("num_attention_heads", 1)])
def test_what_computes_with_the_same_weights_is_another_encoder(
    key: str, value: object, encoder_folder: Path, encoder: TextEncoder, tmp_path: Path
):
    other = tmp_path / "other"
    shutil.copytree(encoder_folder, other)
    config = json.loads((other / "config.json").read_text())
    section = config["text_config"] if key in config.get("text_config", {}) else config
    assert section[key] != value
    section[key] = value
    (other / "config.json").write_text(json.dumps(config))
    assert TextEncoder.load(str(other)).record.xxh3 != encoder.record.xxh3


def test_an_encoder_of_another_size_than_its_weights_is_told(encoder_folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(encoder_folder, other)
    config = json.loads((other / "config.json").read_text())
    section = config["text_config"] if "hidden_size" in config.get("text_config", {}) else config
    section["hidden_size"] = 64
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not a CLIP text encoder"):
        TextEncoder.load(str(other))
