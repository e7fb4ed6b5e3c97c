"""Multi-head self-attention: the one place where attention is computed, and the one that imports flash-attn.

    attention(q, k, v) = softmax(q k^T / sqrt(d)) v, per head                     [Vaswani et al. 2017, Eq. 1]

Torch's scaled_dot_product_attention has several kernels behind it, and the flash-attn packages one each. Which is fastest depends on the
head dimension, the number of tokens and the GPU: FlashAttention pads a head of 72 to 80 or 96. attention_choice.py measures.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any

import torch
import torch.nn.functional as F
from fasttrain_kernels.qk_norm import qk_norm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasttrain.models.implementations import AUTOMATIC, Implementations
from fasttrain.models.ragged import Masked, Packed, RaggedAttend, by_package, by_torch, one_after_another

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [T, d/2] fp32, of the angles by which pairs of a head's elements are turned."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels behind torch's scaled_dot_product_attention."""

PACKAGES = {
    "flash_attn_2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attn_3": ("flash_attn_interface", "install it from the folder hopper/ of the flash-attention repository"),
    "flash_attn_4": ("flash_attn.cute", "pip install flash-attn-4"),
}
"""The flash-attn packages: the module of each, and how it is had."""

ATTENTION = ("auto", *BACKENDS, *PACKAGES)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [B, h, T, d] -> [B, h, T, d] in the dtype of v; softmax and both products accumulate in fp32."""


def attention_function(name: str, deterministic: bool = False) -> Attend:
    """softmax(q k^T / sqrt(d)) v by the attention of this name.

    Args:
        name: one of ATTENTION; "auto" is torch's own choice. Any other one is used or fails: nothing stands in for it.
        deterministic: for the flash-attn packages, a backward pass without atomics. Torch has its own switch for its kernels.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    if name not in ATTENTION:
        raise ValueError(f"unknown attention {name!r}; known: {', '.join(ATTENTION)}")
    if (remedy := missing(name)) is not None:
        raise ValueError(f"attention {name!r}: {remedy}, or choose another one")
    if name in PACKAGES:
        # Imported here, because no run needs more than one of them, and each takes seconds.
        function = importlib.import_module(PACKAGES[name][0]).flash_attn_func
        return functools.partial(_by_package, function=function, deterministic=deterministic)
    return F.scaled_dot_product_attention if name == "auto" else functools.partial(_by_torch, backend=BACKENDS[name])


def ragged_attention(name: str, deterministic: bool = False, packed: bool | None = None) -> RaggedAttend:
    """Attention among tokens some of which are padding, by the attention of this name.

    Args:
        name, deterministic: as for `attention_function`.
        packed: by the bounds of sequences, and not by a mask; None: where the attention has a kernel for it. Where it has none, packed
            sequences are attended to one after another.

    Raises:
        ValueError: as `attention_function`; or a mask for a package, which takes none.
    """
    attend = attention_function(name, deterministic)
    if packed is None:
        packed = name in (*PACKAGES, "flash")
    if name in PACKAGES:
        if not packed:
            raise ValueError(f"attention {name!r} takes no mask: use packed sequences, or another attention")
        return Packed(by_package(importlib.import_module(PACKAGES[name][0]).flash_attn_varlen_func, deterministic))
    if packed:
        return Packed(by_torch if name == "flash" else one_after_another)
    return Masked(attend)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, attn_mask: Tensor | None = None) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def _by_package(q: Tensor, k: Tensor, v: Tensor, function: Callable[..., Any], deterministic: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # 3 x [B, T, h, d]
    out = function(q, k, v, deterministic=deterministic)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # some versions give the log-sum-exp as well


def missing(name: str) -> str | None:
    """What to do so that this attention can be imported; None where nothing is needed. Imports nothing."""
    if name not in PACKAGES:
        return None
    module, remedy = PACKAGES[name]
    parent, _, child = module.rpartition(".")
    spec = importlib.util.find_spec(parent or module)
    if spec is not None and parent:
        spec = PathFinder.find_spec(child, spec.submodule_search_locations)  # find_spec itself would import the parent
    return None if spec else f"the module {module} is not installed: {remedy}"


def describe() -> str:
    """What attention there is on this machine, in words, without running it."""
    if not torch.cuda.is_available():
        return "torch scaled_dot_product_attention, CPU kernel"
    cuda = torch.backends.cuda
    switches = {"flash": cuda.flash_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled(), "efficient": cuda.mem_efficient_sdp_enabled()}
    packages = [name for name in PACKAGES if missing(name) is None]
    return f"by measurement at a run's start, among {', '.join([name for name, on in switches.items() if on] + packages) or 'math only'}"


class QkNorm(nn.Module):
    """RMSNorm of the queries and keys of each head, and their rotation, straight from the packed qkv."""

    def __init__(self, head_width: int, how: Implementations):
        super().__init__()
        self.q_weight = nn.Parameter(torch.ones(head_width))
        self.k_weight = nn.Parameter(torch.ones(head_width))
        self.impl = how.kernels.of("qk_norm")

    def forward(self, qkv: Tensor, heads: int, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = rotation or (None, None)
        return qk_norm(qkv, self.q_weight, self.k_weight, heads=heads, cos=cos, sin=sin, impl=self.impl)  # 3 x [B, h, T, d]


class Attention(nn.Module):
    """Self-attention from one packed qkv matrix with bias; with `qk_norm`, its queries and keys are normalised and may be rotated."""

    def __init__(self, width: int, heads: int, how: Implementations = AUTOMATIC, *, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.attend = attention_function(how.attention, how.deterministic)
        self.qkv = nn.Linear(width, 3 * width)
        self.qk_norm = QkNorm(width // heads, how) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        qkv = self.qkv(x)  # [B, T, 3D]
        return self.proj(self._heads(qkv, rotation))  # [B, T, D]

    def _heads(self, qkv: Tensor, rotation: Rotation | None) -> Tensor:
        if self.qk_norm is None:
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, h, T, d]
        else:
            q, k, v = self.qk_norm(qkv, self.heads, rotation)  # 3 x [B, h, T, d]
        return self.attend(q, k, v).transpose(1, 2).flatten(2)  # [B, T, D]


class QkvProjection(nn.Linear):
    """A packed qkv matrix whose bias is handed in, so that the layer that owns the bias may leave a part of it zero."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)  # [B, T, 3D]


class QvBiasAttention(Attention):
    """Self-attention with learned biases for q and v and none for k, whose bias softmax cancels (BEiT, Min-SNR's ViT)."""

    def __init__(self, width: int, heads: int, how: Implementations = AUTOMATIC, *, qk_norm: bool = False):
        super().__init__(width, heads, how, qk_norm=qk_norm)
        self.qkv = QkvProjection(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # [3D]
        qkv = self.qkv(x, bias)  # [B, T, 3D]
        return self.proj(self._heads(qkv, rotation))  # [B, T, D]
