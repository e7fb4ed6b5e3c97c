"""Attention over text and image where captions have lengths of their own: padding is attended to by nothing that counts.

A batch's sequences are [B, T, D], T = M + N: M places of text, of which the last `length` are the caption's own, then N patches. Padding
comes first (`own_last`), so what counts of each sample lies together. Two ways give the same:

- masked: every query sees the keys of its sample that are not padding;
- packed: the batch's B T rows as one packed row of sequences, a sample's padding as a sequence beside its own, for kernels that take
  sequences of any length by their bounds. Nothing is copied, no size depends on the lengths, and so the host never waits for them.

What attention gives for padding itself is finite, and nothing reads it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

Masking = Callable[..., Tensor]
"""(q, k, v, attn_mask=[B, 1, 1, T] bool) -> [B, h, T, d]"""
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(q, k, v: [rows, h, d]; bounds [S + 1] int32 of S sequences; the longest one's most rows) -> [rows, h, d]"""


def own_last(tokens: Tensor, length: Tensor) -> Tensor:
    """Each caption's own tokens moved behind its padding, in their order.

    Args:
        tokens: [B, M, E], a caption's own ones first.
        length: [B] int64, how many are its own.
    """
    places = tokens.shape[1]
    source = (torch.arange(places, device=tokens.device) + length[:, None]) % places  # [B, M]
    return tokens.gather(1, source[..., None].expand_as(tokens))  # [B, M, E]


class RaggedAttend(Protocol):
    """One way to attend among the tokens that count."""

    def where(self, length: Tensor, text: int, image: int) -> Tensor:
        """What `__call__` must know of a batch's captions of `length` [B] tokens among `text` places, before `image` patches."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v, each [B, h, T, d], among the tokens that count."""


class Masked:
    """Attention by a mask over keys."""

    def __init__(self, attend: Masking):
        self.attend = attend

    def where(self, length: Tensor, text: int, image: int) -> Tensor:
        """[B, 1, 1, T] bool: the keys that count."""
        places = torch.arange(text + image, device=length.device)
        return (places >= text - length[:, None])[:, None, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor) -> Tensor:
        return self.attend(q, k, v, attn_mask=where)


class Packed:
    """Attention by the bounds of sequences: a sample's padding, its own tokens, the next one's padding, ..."""

    def __init__(self, varlen: Varlen):
        self.varlen = varlen

    def where(self, length: Tensor, text: int, image: int) -> Tensor:
        """[2B + 1] int32: where each sequence begins, and the end."""
        total = text + image
        begin = torch.arange(len(length) + 1, device=length.device) * total  # [B + 1]
        bounds = torch.stack([begin[:-1], begin[:-1] + text - length], dim=1).flatten()  # [2B]
        return torch.cat([bounds, begin[-1:]]).int()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor) -> Tensor:
        batch, _, tokens, _ = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # 3 x [B T, h, d]
        return self.varlen(q, k, v, where, tokens).unflatten(0, (batch, tokens)).transpose(1, 2)  # [B, h, T, d]


def one_after_another(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Packed attention in plain torch, sequence by sequence: the host reads the bounds, so it is for CPUs and comparison."""
    sizes = [size for size in bounds.diff().tolist() if size]
    triples = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    outs = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in triple))[0].transpose(0, 1) for triple in triples]
    return torch.cat(outs)  # [rows, h, d]


def by_package(function: Callable[..., Any], deterministic: bool) -> Varlen:
    """A flash-attn package's attention for sequences by their bounds."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        sizes = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = function(q, k, v, **sizes, deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out

    return varlen


def by_torch(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Torch's own flash attention for sequences by their bounds: CUDA, bf16 or fp16."""
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest)
    return out[0] if isinstance(out, tuple) else out
