"""Multi-head self-attention: the one place where attention is computed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, per head; softmax and both products accumulate in fp32.

    Args:
        q, k, v: [B, h, T, d], any float dtype.

    Returns:
        [B, h, T, d] in the dtype of v.
    """
    return F.scaled_dot_product_attention(q, k, v)


def describe() -> str:
    """What `attend` uses on this machine, in words, without running it."""
    if not torch.cuda.is_available():
        return "torch scaled_dot_product_attention, CPU kernel"
    cuda = torch.backends.cuda
    switches = {"flash": cuda.flash_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled(), "efficient": cuda.mem_efficient_sdp_enabled()}
    return f"torch scaled_dot_product_attention, CUDA: {', '.join(name for name, on in switches.items() if on) or 'math only'}"


class Attention(nn.Module):
    """Self-attention from one packed qkv matrix with bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)  # [B, T, 3D]
        return self.proj(self._heads(qkv))  # [B, T, D]

    def _heads(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, h, T, d]
        return attend(q, k, v).transpose(1, 2).flatten(2)  # [B, T, D]


class QkvProjection(nn.Linear):
    """A packed qkv matrix whose bias is handed in, so that the layer that owns the bias may leave a part of it zero."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)  # [B, T, 3D]


class QvBiasAttention(Attention):
    """Self-attention with learned biases for q and v and none for k, whose bias softmax cancels (BEiT, Min-SNR's ViT)."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.qkv = QkvProjection(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # [3D]
        qkv = self.qkv(x, bias)  # [B, T, 3D]
        return self.proj(self._heads(qkv))  # [B, T, D]
