"""A CLIP text encoder of random weights in transformers' own files, small enough for a CPU, with a tokenizer of letters and given words."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "digit",
    "handwritten",
    *["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
)


def write_tiny_encoder(
    folder: Path,
    hidden: int = 32,
    layers: int = 2,
    projection: int | None = 24,
    places: int = 32,
    words: Sequence[str] = WORDS,
    seed: int = 0,
) -> Path:
    """Writes config, safetensors weights and tokenizer; `projection` None: without one (CLIPTextModel)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder, words)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=places,
        projection_dim=projection or hidden,
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
        # Random weights of CLIP's own scale would give tokens that hardly differ.
        initializer_factor=4.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> dict[str, int]:
    """Writes vocab.json and merges.txt of a byte-pair encoding that joins each word letter by letter; returns the vocabulary."""
    letters = [chr(code) for code in (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))]
    letters += [chr(256 + extra) for extra in range(256 - len(letters))]
    merges = dict.fromkeys(pair for word in words for pair in _chain(word))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), BEGIN, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return vocabulary


def _chain(word: str) -> list[tuple[str, str]]:
    """The merges that make one token of a word, from its begin."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(parts[:n]), parts[n]) for n in range(1, len(parts))]
