"""The vanilla vision transformer of the Min-SNR paper: time and class enter as tokens, nothing modulates.

Hang et al. 2023 (section 4.1), and their public code where the paper is silent. Tokens [time, class, patches] with one
learned position each; timesteps and classes are rows of tables; pre-norm blocks; no final norm; the last linear layer in
fp32 and nearly zero at the start. The parameters bear the public code's names.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasttrain.models import flops
from fasttrain.models.architecture import MODELS, Transformer
from fasttrain.models.attention import QvBiasAttention
from fasttrain.models.embeddings import look_up
from fasttrain.models.layers import Fp32Linear, Mlp, PatchEmbed, check_input, run_block, unpatchify

NORM_EPS = 1e-6


@MODELS.register("vit")
@dataclass(frozen=True, kw_only=True)
class ViT(Transformer):
    """Config of the Min-SNR paper's ViT.

    Args:
        num_timesteps: rows of the time table, at least the schedule's T. The paper's code has 4000 and uses 1000.

    Raises:
        ValueError: as Transformer; or num_timesteps is not positive.
    """

    num_timesteps: int = 4000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_timesteps < 1:
            raise ValueError(f"model.num_timesteps must be at least 1, not {self.num_timesteps}")

    @property
    def extra_tokens(self) -> int:
        """Tokens that are not patches: time, and class where there is one."""
        return 1 if self.null_label is None else 2

    def build(self) -> "VisionTransformer":
        return VisionTransformer(self)

    def flops_per_image(self) -> int:
        patches = self.grid**2
        ends = 2 * flops.patches(self.width, self.patch, self.geometry()[0], patches)
        return flops.blocks(self.width, self.depth, patches + self.extra_tokens) + ends


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). LayerNorm takes its statistics in fp32 for every input dtype."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = QvBiasAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, gelu="none")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # [B, T, D]
        return x + self.mlp(self.norm2(x))  # [B, T, D]


class VisionTransformer(nn.Module):
    """model(x [B, C, H, W], t [B] integer, labels [B] int64) -> [B, C, H, W] fp32; an unconditional model ignores the labels."""

    def __init__(self, config: ViT):
        super().__init__()
        channels, _, num_classes = config.geometry()
        width = config.width
        self.config = config
        self.patch_embed = PatchEmbed(channels, config.patch, width)
        self.pos_embed = nn.Parameter(torch.empty(1, config.extra_tokens + config.grid**2, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.linear_projection = Fp32Linear(width, config.patch**2 * channels)
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.time_embedding = nn.Embedding(config.num_timesteps, width)
        self._initialize()

    def _initialize(self) -> None:
        """The patch convolution keeps torch's default and the two tables their N(0, 1), as in the paper's code."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        with torch.no_grad():
            # Each block adds two branches to the stream: shrink them so that its variance does not grow with the depth.
            blocks = (layer for layer in self.modules() if isinstance(layer, Block))
            for number, block in enumerate(blocks, start=1):
                block.attn.proj.weight.div_(math.sqrt(2 * number))
                block.mlp.fc2.weight.div_(math.sqrt(2 * number))
            # The first prediction is then almost zero: the loss starts at the target's variance.
            self.linear_projection.weight.mul_(0.001)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction for noisy latents.

        Raises:
            ValueError: x of another shape; real timesteps; labels missing; on a CPU, a timestep or label past its table.
        """
        channels, size, _ = self.config.geometry()
        check_input(x, channels, size)
        head = self._head_tokens(t, labels)  # [B, 1 or 2, D]
        x = self.patch_embed(x).to(head.dtype)  # [B, N, D]
        x = torch.cat([head, x], dim=1) + self.pos_embed  # [B, T, D]
        for block in self.blocks:
            x = run_block(block, x, recompute=self.config.checkpoint_blocks)  # [B, T, D]
        x = self.linear_projection(x[:, self.config.extra_tokens :])  # [B, N, p*p*C]
        return unpatchify(x, self.config.patch, channels)  # [B, C, H, W]

    def _head_tokens(self, t: Tensor, labels: Tensor | None) -> Tensor:
        if t.is_floating_point():
            raise ValueError(f"the ViT's time table takes integer timesteps, got {t.dtype}: use a discrete schedule, or a DiT")
        tokens = [look_up(self.time_embedding, t, "timestep")]  # [B, D]
        if self.class_embedding is not None:
            if labels is None:
                raise ValueError(f"a class-conditional model needs labels; {self.config.null_label} stands for no class")
            tokens.append(look_up(self.class_embedding, labels, "label"))  # [B, D]
        return torch.stack(tokens, dim=1)  # [B, 1 or 2, D]
