"""The plain parts that transformers here share: patches in and out, the MLP, layers that compute in fp32."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MLP_RATIO = 4


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A region where autocast, which the meta device does not have, leaves dtypes alone."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Fp32Linear(nn.Linear):
    """A linear layer computed in fp32 whatever the dtype it is stored in; returns fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias)  # [..., out]


class Fp32Conv2d(nn.Conv2d):
    """A convolution computed in fp32 whatever the dtype it is stored in; returns fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias)  # [B, out, H, W]


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, in raster order, computed in fp32 (the input has few channels: it costs nothing)."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = Fp32Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)  # [B, D, H/p, W/p]
        return x.flatten(2).transpose(1, 2)  # [B, N, D]


class Mlp(nn.Module):
    """Linear, GELU, Linear, four times as wide inside."""

    def __init__(self, width: int, gelu: Literal["none", "tanh"]):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.act = nn.GELU(approximate=gelu)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))  # [B, T, 4D]
        return self.fc2(x)  # [B, T, D]


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """[B, N, p*p*C], patches in raster order with the channel last, to [B, C, H, W]; H = W = p sqrt(N)."""
    grid = round(tokens.shape[1] ** 0.5)
    x = tokens.unflatten(2, (patch, patch, channels)).unflatten(1, (grid, grid))  # [B, h, w, p, q, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, C, H, W]


def check_input(x: Tensor, channels: int, size: int) -> None:
    """Refuses a batch of another shape than the model was built for, before it fails deep inside.

    Raises:
        ValueError: x is not [B, channels, size, size].
    """
    if x.shape[1:] != (channels, size, size):
        raise ValueError(f"the model takes [B, {channels}, {size}, {size}], got {list(x.shape)}")


def run_block(block: Callable[..., Tensor], *args: Any, recompute: bool) -> Tensor:
    """block(*args); with `recompute`, its activations are dropped and computed again in the backward pass."""
    if not (recompute and torch.is_grad_enabled()):
        return block(*args)
    # No block draws random numbers, so the generators' state need not be kept.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
