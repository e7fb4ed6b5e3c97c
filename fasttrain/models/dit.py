"""DiT: a transformer whose every norm is scaled, shifted and gated by time and class (adaLN-Zero).

Peebles and Xie 2022, section 3.2, and their public code. Every block starts as the identity and the network as the zero
function, because all modulation and the last layer start at zero. The parameters bear the public code's names.
"""

from dataclasses import dataclass

import torch
from fasttrain_kernels.adaln import adaln
from fasttrain_kernels.gated_adaln import gated_adaln
from torch import Tensor, nn

from fasttrain.cond import Cond
from fasttrain.models import flops
from fasttrain.models.architecture import MODELS
from fasttrain.models.attention import Attention, Rotation
from fasttrain.models.embeddings import AxialRotation, LabelEmbedder, TimestepEmbedder, sincos_positions
from fasttrain.models.implementations import AUTOMATIC, Implementations
from fasttrain.models.layers import NORM_EPS, Mlp, PatchEmbed, check_input, unpatchify
from fasttrain.models.modulated import Modulated
from fasttrain.models.network import Network, run_block

Pending = tuple[Tensor, Tensor] | None
"""A branch [B, N, D] still to be added to the tokens, and its gate [B, D]; None where there is none."""


@MODELS.register("dit")
@dataclass(frozen=True, kw_only=True)
class DiT(Modulated):
    """Config of DiT.

    Args:
        learn_sigma: keep the public checkpoints' output of 2C channels; only the first C, the prediction, are returned.

    Raises:
        ValueError: as Modulated.
    """

    learn_sigma: bool = False

    @property
    def out_channels(self) -> int:
        """Channels of the last layer."""
        return self.geometry()[0] * (2 if self.learn_sigma else 1)

    def build(self, how: Implementations = AUTOMATIC) -> "DiffusionTransformer":
        return DiffusionTransformer(self, how)

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


class ModulatedNorm(nn.Module):
    """The end of one branch and the adaptive norm before the next, in one pass; no parameters of its own."""

    def __init__(self, config: DiT, how: Implementations):
        super().__init__()
        self.norm = config.norm
        self.plain, self.gated = how.kernels.of("adaln"), how.kernels.of("gated_adaln")

    def forward(self, x: Tensor, pending: Pending, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """x with its pending branch added, and the same normalised and modulated: 2 x [B, N, D]."""
        if pending is None:
            return x, adaln(x, scale, shift, norm=self.norm, eps=NORM_EPS, impl=self.plain)
        branch, gate = pending
        # A branch comes in x's dtype by itself, except under autocast.
        return gated_adaln(x, branch.to(x.dtype), gate, scale, shift, norm=self.norm, eps=NORM_EPS, impl=self.gated)


class Block(nn.Module):
    """x + gate * attention(adaln(x)), then x + gate * mlp(adaln(x)).

    Takes x and what is pending from the block before, and leaves x and its MLP's branch and gate; see Network.
    """

    def __init__(self, config: DiT, how: Implementations):
        super().__init__()
        self.adds_its_own = config.checkpoint_blocks
        self.norm = ModulatedNorm(config, how)
        self.attn = Attention(config.width, config.heads, how, qk_norm=config.qk_norm)
        self.mlp = Mlp(config.width, "tanh", how)
        self.adaLN_modulation = Modulation(config.width, 6)

    def forward(self, x: Tensor, pending: Pending, cond: Tensor, rotation: Rotation | None) -> tuple[Tensor, Pending]:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(cond).chunk(6, dim=1)  # 6 x [B, D]
        x, y = self.norm(x, pending, scale_attn, shift_attn)  # 2 x [B, N, D]
        branch = self.attn(y, rotation)  # [B, N, D]
        x, y = self.norm(x, (branch, gate_attn), scale_mlp, shift_mlp)  # 2 x [B, N, D]
        branch = self.mlp(y)  # [B, N, D]
        if self.adds_its_own:
            return x + gate_mlp[:, None] * branch, None  # [B, N, D]
        return x, (branch, gate_mlp)


class FinalLayer(nn.Module):
    """linear(adaln(x)): tokens to patches."""

    def __init__(self, config: DiT, how: Implementations):
        super().__init__()
        self.norm = ModulatedNorm(config, how)
        self.linear = nn.Linear(config.width, config.patch**2 * config.out_channels)
        self.adaLN_modulation = Modulation(config.width, 2)

    def forward(self, x: Tensor, pending: Pending, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=1)  # 2 x [B, D]
        _, x = self.norm(x, pending, scale, shift)  # [B, N, D]
        return self.linear(x)  # [B, N, p*p*C]


class DiffusionTransformer(Network):
    """model(x [B, C, H, W], t [B] integer or real, cond) -> [B, C, H, W] in the weights' dtype.

    An unconditional model ignores the conditions.
    """

    def __init__(self, config: DiT, how: Implementations = AUTOMATIC):
        super().__init__()
        channels, _, num_classes = config.geometry()
        self.config = config
        self.x_embedder = PatchEmbed(channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(num_classes, config.width) if num_classes else None
        # A parameter, though never trained, because the public checkpoints hold it.
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.width), requires_grad=False)
        self.rotation = AxialRotation(config.head_width, config.grid, config.extra_tokens) if config.rotary else None
        self.blocks = nn.ModuleList(Block(config, how) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, how)
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

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction for noisy latents.

        Raises:
            ValueError: x of another shape; labels missing; on a CPU, a label past the table.
        """
        channels, size, _ = self.config.geometry()
        check_input(x, channels, size)
        dtype = self.pos_embed.dtype
        vector = self._condition(t, cond.labels, dtype)  # [B, D]
        x = self.x_embedder(x).to(dtype) + self.pos_embed  # [B, N, D]
        rotation = self.rotation() if self.rotation else None
        pending = None
        for block in self.blocks:
            x, pending = run_block(block, x, pending, vector, rotation, recompute=self.config.checkpoint_blocks)  # [B, N, D]
        x = self.final_layer(x, pending, vector)  # [B, N, p*p*(C or 2C)]
        x = unpatchify(x, self.config.patch, self.config.out_channels)  # [B, C or 2C, H, W]
        return x[:, :channels]  # [B, C, H, W]

    def _condition(self, t: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        cond = self.t_embedder(t, dtype)  # [B, D]
        if self.y_embedder is None:
            return cond
        if labels is None:
            raise ValueError(f"a class-conditional model needs labels; {self.config.null_label} stands for no class")
        return cond + self.y_embedder(labels)  # [B, D]
