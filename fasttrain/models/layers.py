"""The plain parts that transformers here share: patches in and out, the norm, the MLP, layers that compute in fp32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from fasttrain_kernels.bias_gelu import bias_gelu
from fasttrain_kernels.residual_norm import residual_norm
from torch import Tensor, nn

from fasttrain.models.implementations import AUTOMATIC, Implementations

MLP_RATIO = 4
NORM_EPS = 1e-6


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


class AffineNorm(nn.Module):
    """The end of one branch and the layer norm before the next, in one pass; owns the norm's weights, as nn.LayerNorm would."""

    def __init__(self, width: int, how: Implementations = AUTOMATIC):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.impl = how.kernels.of("residual_norm")

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        return residual_norm(x, branch, self.weight, self.bias, eps=NORM_EPS, impl=self.impl)  # x + branch, y: 2 x [B, T, D]


class GeluLinear(nn.Linear):
    """gelu(W x + b): the bias is added where the activation is computed, in one pass over the widest tensor of a block."""

    def __init__(self, inputs: int, outputs: int, gelu: Literal["none", "tanh"], how: Implementations = AUTOMATIC):
        super().__init__(inputs, outputs)
        self.gelu = gelu
        self.impl = how.kernels.of("bias_gelu")

    def forward(self, x: Tensor) -> Tensor:
        return bias_gelu(F.linear(x, self.weight), self.bias, approximate=self.gelu, impl=self.impl)  # [..., out]


class Mlp(nn.Module):
    """Linear, GELU, Linear, four times as wide inside."""

    def __init__(self, width: int, gelu: Literal["none", "tanh"], how: Implementations = AUTOMATIC):
        super().__init__()
        self.fc1 = GeluLinear(width, MLP_RATIO * width, gelu, how)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # [B, T, 4D]
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
