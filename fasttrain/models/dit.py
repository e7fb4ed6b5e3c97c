"""DiT: a transformer whose every norm is scaled, shifted and gated by time and class (adaLN-Zero).

Peebles and Xie 2022, section 3.2, and their public code. Every block starts as the identity and the network as the zero
function, because all modulation and the last layer start at zero. The parameters bear the public code's names.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from fasttrain_kernels.adaln import adaln
from torch import Tensor, nn

from fasttrain.models import flops
from fasttrain.models.architecture import MODELS, Transformer
from fasttrain.models.attention import Attention
from fasttrain.models.embeddings import LabelEmbedder, TimestepEmbedder, sincos_positions
from fasttrain.models.layers import Mlp, PatchEmbed, check_input, run_block, unpatchify


@MODELS.register("dit")
@dataclass(frozen=True, kw_only=True)
class DiT(Transformer):
    """Config of DiT.

    Args:
        norm: "layer" as published, or "rms" (no mean subtracted). Neither has parameters.
        learn_sigma: keep the public checkpoints' output of 2C channels; only the first C, the prediction, are returned.

    Raises:
        ValueError: as Transformer; or the width is not divisible by 4, which the fixed positions need.
    """

    norm: Literal["layer", "rms"] = "layer"
    learn_sigma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 4:
            raise ValueError(f"model.width {self.width} is not divisible by 4, which the sin-cos positions need")

    @property
    def out_channels(self) -> int:
        """Channels of the last layer."""
        return self.geometry()[0] * (2 if self.learn_sigma else 1)

    def build(self) -> "DiffusionTransformer":
        return DiffusionTransformer(self)

    def flops_per_image(self) -> int:
        patches, width = self.grid**2, self.width
        time = flops.linear(TimestepEmbedder.frequencies, width) + flops.linear(width, width)
        first = flops.patches(width, self.patch, self.geometry()[0], patches)
        last = flops.patches(width, self.patch, self.out_channels, patches) + flops.linear(width, 2 * width)
        return flops.blocks(width, self.depth, patches) + flops.modulation(width, self.depth) + time + first + last


class Modulation(nn.Sequential):
    """SiLU and a linear layer: from the conditioning vector [B, D] to `count` vectors [B, count * D]."""

    def __init__(self, width: int, count: int):
        super().__init__(nn.SiLU(), nn.Linear(width, count * width))


class Block(nn.Module):
    """x + gate * attention(adaln(x)), then x + gate * mlp(adaln(x)); the norms have no parameters of their own."""

    def __init__(self, config: DiT):
        super().__init__()
        self.norm = config.norm
        self.kernels = config.kernels
        self.attn = Attention(config.width, config.heads)
        self.mlp = Mlp(config.width, gelu="tanh")
        self.adaLN_modulation = Modulation(config.width, 6)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(cond).chunk(6, dim=1)  # 6 x [B, D]
        y = adaln(x, scale_attn, shift_attn, norm=self.norm, impl=self.kernels)  # [B, N, D]
        x = x + gate_attn[:, None] * self.attn(y)  # [B, N, D]
        y = adaln(x, scale_mlp, shift_mlp, norm=self.norm, impl=self.kernels)  # [B, N, D]
        return x + gate_mlp[:, None] * self.mlp(y)  # [B, N, D]


class FinalLayer(nn.Module):
    """linear(adaln(x)): tokens to patches."""

    def __init__(self, config: DiT):
        super().__init__()
        self.norm = config.norm
        self.kernels = config.kernels
        self.linear = nn.Linear(config.width, config.patch**2 * config.out_channels)
        self.adaLN_modulation = Modulation(config.width, 2)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=1)  # 2 x [B, D]
        x = adaln(x, scale, shift, norm=self.norm, impl=self.kernels)  # [B, N, D]
        return self.linear(x)  # [B, N, p*p*C]


class DiffusionTransformer(nn.Module):
    """model(x [B, C, H, W], t [B] integer or real, labels [B] int64) -> [B, C, H, W] in the weights' dtype.

    An unconditional model ignores the labels.
    """

    def __init__(self, config: DiT):
        super().__init__()
        channels, _, num_classes = config.geometry()
        self.config = config
        self.x_embedder = PatchEmbed(channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(num_classes, config.width) if num_classes else None
        # A parameter, though never trained, because the public checkpoints hold it.
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialize()

    def _initialize(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                # The patch convolution is a matrix from p*p*C values to D: its fans are that matrix's, not a convolution's.
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in (*self.t_embedder.modules(), *(self.y_embedder.modules() if self.y_embedder else ())):
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
        # Zero gates make every block the identity at the start; a zero last layer makes the first prediction zero.
        zero = [self.final_layer.linear, *(layer for layer in self.modules() if isinstance(layer, Modulation))]
        for parameter in (parameter for layer in zero for parameter in layer.parameters()):
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.config.width, self.config.grid))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction for noisy latents.

        Raises:
            ValueError: x of another shape; labels missing; on a CPU, a label past the table.
        """
        channels, size, _ = self.config.geometry()
        check_input(x, channels, size)
        dtype = self.pos_embed.dtype
        cond = self._condition(t, labels, dtype)  # [B, D]
        x = self.x_embedder(x).to(dtype) + self.pos_embed  # [B, N, D]
        for block in self.blocks:
            x = run_block(block, x, cond, recompute=self.config.checkpoint_blocks)  # [B, N, D]
        x = self.final_layer(x, cond)  # [B, N, p*p*(C or 2C)]
        x = unpatchify(x, self.config.patch, self.config.out_channels)  # [B, C or 2C, H, W]
        return x[:, :channels]  # [B, C, H, W]

    def _condition(self, t: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        cond = self.t_embedder(t, dtype)  # [B, D]
        if self.y_embedder is None:
            return cond
        if labels is None:
            raise ValueError(f"a class-conditional model needs labels; {self.config.null_label} stands for no class")
        return cond + self.y_embedder(labels)  # [B, D]
