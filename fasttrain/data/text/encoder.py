"""CLIP's text encoder, through transformers: the only file that imports it.

Of each caption are kept the last hidden states of its own tokens, from begin to end mark, and a pooled vector: the end mark's state,
through the encoder's projection where its weights have one (CLIPModel, CLIPTextModelWithProjection) and as it is where not (CLIPTextModel).
Attention is causal, so what stands behind the end mark changes nothing, and is not kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor

from fasttrain.data.index import DIGEST
from fasttrain.data.pretrained import first_line, pinned
from fasttrain.errors import UserError

_WHAT = "a CLIP text encoder with its tokenizer"
_PROJECTED = {"CLIPModel": True, "CLIPTextModelWithProjection": True, "CLIPTextModel": False}
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_LEAST_TOKENS = 3  # the two marks and a word
# What computes states beside the parameters, and words whose cutting tells one tokenizer from another of the same vocabulary.
_COMPUTING = ("hidden_act", "num_attention_heads", "layer_norm_eps", "num_hidden_layers")
_PROBES = ("a photo of the quickest brown foxes", "seventeen handwritten numerals", "Été à la mer, 3.14")


class EncoderRecord(BaseModel):
    """Which encoder this is, and the shapes of what it gives.

    Attributes:
        id: hub id, or the name of the folder.
        revision: commit of a hub id.
        xxh3: of its weights and vocabulary as loaded: the same from the hub and from a copy in a folder.
        tokens: M, places of a caption; what is longer is cut.
        width: E, of a token.
        pooled: P, of the pooled vector.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str
    revision: str | None = None
    xxh3: str = Field(pattern=DIGEST)
    tokens: int = Field(ge=1)
    width: int = Field(ge=1)
    pooled: int = Field(ge=1)


class Encoded(NamedTuple):
    """One caption: float16 tokens [m, E] and pooled [P], and how many tokens it had before it was cut to M."""

    tokens: np.ndarray
    pooled: np.ndarray
    uncut: int


class TextEncoder:
    """A text encoder in fp32 with its tokenizer. Its record says which weights these are."""

    def __init__(self, model: Any, tokenizer: Any, record: EncoderRecord):
        self.model = model
        self.tokenizer = tokenizer
        self.record = record

    @classmethod
    def load(
        cls,
        name: str,
        revision: str | None = None,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
        option: str = "--encoder",
    ) -> "TextEncoder":
        """An encoder from a folder, or from the Hugging Face hub at a pinned revision.

        Args:
            name: folder with config.json, safetensors weights and the tokenizer's files, or a hub id (owner/name).
            revision: commit hash, 40 hexadecimal digits; needed for a hub id, since a branch may move.
            max_tokens: M, the two marks included; default: as many as the encoder has places.
            device: where it computes.
            option: what named it, for messages.

        Raises:
            UserError: transformers is absent, no such folder, no CLIP text encoder or tokenizer, or a hub id without its commit.
        """
        commit = pinned(option, name, revision, _WHAT)
        model = _model(option, name, commit)
        tokenizer = _tokenizer(option, name, commit)
        places = int(model.config.max_position_embeddings)
        if max_tokens is not None and not _LEAST_TOKENS <= max_tokens <= places:
            raise UserError(f"--max-tokens {max_tokens}: {option} {name} takes {_LEAST_TOKENS} to {places}")
        if len(tokenizer) > model.config.vocab_size:
            told = f"its tokenizer has {len(tokenizer)} words, its weights {model.config.vocab_size}"
            raise UserError(f"{option} {name}: {told}; give a tokenizer and weights that belong together")
        record = EncoderRecord(
            id=Path(name).resolve().name if commit is None else name,
            revision=commit,
            xxh3=_content_digest(model, tokenizer),
            tokens=max_tokens or places,
            width=int(model.config.hidden_size),
            pooled=int(model.config.projection_dim if _projection(model) else model.config.hidden_size),
        )
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, record)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Encoded]:
        """Captions as one batch; in fp32 their last bits depend on what else is in it, which float16 mostly hides.

        Raises:
            UserError: states that float16 cannot hold.
        """
        uncut = self.tokenizer(list(captions), verbose=False)["input_ids"]
        most = self.record.tokens
        ids = [row if len(row) <= most else [*row[: most - 1], row[-1]] for row in uncut]
        states, pooled = (values.to("cpu", torch.float16).numpy() for values in self._states(ids))
        if not (np.isfinite(states).all() and np.isfinite(pooled).all()):
            raise UserError(f"{self.record.id}: gave states that are not finite in float16; check its weights")
        return [Encoded(states[i, : len(row)], pooled[i], len(uncut[i])) for i, row in enumerate(ids)]

    def _states(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token numbers -> last hidden states [B, longest, E] and pooled [B, P], fp32."""
        longest = max(map(len, ids))
        # 0 behind the end mark is any token: causal attention does not look ahead.
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=self.model.device)
        states = self.model(input_ids=padded).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in ids], device=states.device)
        pooled = states[torch.arange(len(ids), device=states.device), last]
        project = _projection(self.model)
        return states, project(pooled) if project else pooled


def _model(option: str, name: str, commit: str | None) -> Any:
    try:
        from transformers import AutoConfig, CLIPTextModel, CLIPTextModelWithProjection
    except ImportError as error:
        raise UserError(f"{option} needs transformers ({error}): pip install 'fasttrain[text]'") from None
    try:
        # Otherwise an unknown kind's own Python files would be offered to be run.
        named = AutoConfig.from_pretrained(name, trust_remote_code=False, **_where(commit)).architectures or ["none"]
        if named[0] not in _PROJECTED:
            raise UserError(f"{option} {name}: its config names {named[0]}; give {_WHAT} ({', '.join(_PROJECTED)})")
        kind: Any = CLIPTextModelWithProjection if _PROJECTED[named[0]] else CLIPTextModel
        # Safetensors only: the other format is a pickle, which runs code.
        model, found = kind.from_pretrained(name, **_where(commit), use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{option} {name}: not {_WHAT}, in safetensors ({first_line(error)})") from None
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{option} {name}: its weights lack {len(missing)} tensors ({missing[0]} ...); restore the file")
    return model


def _tokenizer(option: str, name: str, commit: str | None) -> Any:
    from transformers import CLIPTokenizer

    folder = Path(name)
    if commit is None and not any(all((folder / file).is_file() for file in files) for files in _TOKENIZER_FILES):
        told = "no tokenizer in it (tokenizer.json, or vocab.json and merges.txt); copy the tokenizer's files beside the weights"
        raise UserError(f"{option} {name}: {told}")
    try:
        return CLIPTokenizer.from_pretrained(name, **_where(commit))
    except Exception as error:  # the tokenizers library raises plain Exception where a file is damaged
        raise UserError(f"{option} {name}: its tokenizer cannot be read ({first_line(error)}); restore its files") from None


def _where(commit: str | None) -> dict[str, Any]:
    """Where transformers looks: in a folder alone, or on the hub at a commit."""
    return {"local_files_only": True} if commit is None else {"revision": commit}


def _projection(model: Any) -> Any:
    """The map from the end mark's state to the pooled vector; None where the model has none."""
    return getattr(model, "text_projection", None)


def _content_digest(model: Any, tokenizer: Any) -> str:
    """xxh3 of all that decides states: parameters, what computes with them, vocabulary, and how the tokenizer cuts words.

    Parameters' names go without a prefix that versions of transformers disagree on.
    """
    hasher = xxhash.xxh3_128()
    for key in _COMPUTING:
        hasher.update(f"{key}\0{getattr(model.config, key)}\n".encode())
    for words in _PROBES:
        hasher.update(f"{tokenizer(words).input_ids}\n".encode())
    for name, values in sorted((name.removeprefix("text_model."), values) for name, values in model.named_parameters()):
        hasher.update(f"{name}\0{list(values.shape)}\0".encode())
        hasher.update(values.detach().contiguous().numpy())
    for word, number in sorted(tokenizer.get_vocab().items()):
        hasher.update(f"{word}\0{number}\n".encode(errors="surrogatepass"))
    return hasher.hexdigest()
