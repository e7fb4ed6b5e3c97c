"""The vanilla vision transformer of the Min-SNR paper: time and class enter as tokens, nothing modulates.

Hang et al. 2023 (section 4.1), and their public code where the paper is silent. Tokens [time, class, patches] with one
learned position each; timesteps and classes are rows of tables; pre-norm blocks; no final norm; the last linear layer in
fp32 and nearly zero at the start. The parameters bear the public code's names.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasttrain.cond import Cond
from fasttrain.models import flops
from fasttrain.models.architecture import MODELS, MOST_ROWS, Transformer
from fasttrain.models.attention import QvBiasAttention, Rotation
from fasttrain.models.embeddings import AxialRotation, grid_coordinates, look_up
from fasttrain.models.implementations import AUTOMATIC, Implementations
from fasttrain.models.layers import AffineNorm, Fp32Linear, Mlp, PatchEmbed, check_input, unpatchify
from fasttrain.models.network import Network, run_block
from fasttrain.registry import shown


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
        if not 1 <= self.num_timesteps <= MOST_ROWS:
            raise ValueError(f"model.num_timesteps must be at least 1 and at most {MOST_ROWS}, not {shown(self.num_timesteps)}")

    @property
    def extra_tokens(self) -> int:
        """Tokens that are not patches: time, and class where there is one."""
        return 1 if self.null_label is None else 2

    def build(self, how: Implementations = AUTOMATIC) -> "VisionTransformer":
        return VisionTransformer(self, how)

    def flops_per_image(self) -> int:
        ends = 2 * flops.patches(self.width, self.patch, self.geometry()[0], self.grid**2)
        return flops.blocks(self.width, self.depth, self.tokens) + ends


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The norms take their statistics in fp32 for every input dtype.

    Takes x and a branch still to be added to it (None before the first block), and leaves x and the MLP's branch; see Network.
    """

    def __init__(self, config: ViT, how: Implementations):
        super().__init__()
        self.adds_its_own = config.checkpoint_blocks
        self.norm1 = AffineNorm(config.width, how)
        self.attn = QvBiasAttention(config.width, config.heads, how, qk_norm=config.qk_norm)
        self.norm2 = AffineNorm(config.width, how)
        self.mlp = Mlp(config.width, "none", how)

    def forward(self, x: Tensor, branch: Tensor | None, rotation: Rotation | None) -> tuple[Tensor, Tensor | None]:
        # Branches come in x's dtype by themselves, except under autocast.
        x, y = self.norm1(x, branch)  # 2 x [B, T, D]
        branch = self.attn(y, rotation).to(x.dtype)  # [B, T, D]
        x, y = self.norm2(x, branch)  # 2 x [B, T, D]
        branch = self.mlp(y).to(x.dtype)  # [B, T, D]
        return (x + branch, None) if self.adds_its_own else (x, branch)


class VisionTransformer(Network):
    """model(x [B, C, H, W], t [B] integer, cond) -> [B, C, H, W] fp32; an unconditional model ignores the conditions."""

    def __init__(self, config: ViT, how: Implementations = AUTOMATIC):
        super().__init__()
        channels, _, num_classes = config.geometry()
        width = config.width
        self.config = config
        self.patch_embed = PatchEmbed(channels, config.patch, width)
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, width))
        self.rotation = AxialRotation(config.head_width, grid_coordinates(config.grid), config.extra_tokens) if config.rotary else None
        self.blocks = nn.ModuleList(Block(config, how) for _ in range(config.depth))
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

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction for noisy latents.

        Raises:
            ValueError: x of another shape; real timesteps; labels missing; on a CPU, a timestep or label past its table.
        """
        channels, size, _ = self.config.geometry()
        check_input(x, channels, size)
        head = self._head_tokens(t, cond.labels)  # [B, 1 or 2, D]
        x = self.patch_embed(x).to(head.dtype)  # [B, N, D]
        x = torch.cat([head, x], dim=1) + self.pos_embed  # [B, T, D]
        rotation = self.rotation() if self.rotation else None
        branch = None
        for block in self.blocks:
            x, branch = run_block(block, x, branch, rotation, recompute=self.config.checkpoint_blocks)  # 2 x [B, T, D]
        x = x if branch is None else x + branch  # [B, T, D]
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
