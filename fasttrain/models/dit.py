"""DiT: a transformer whose every norm is scaled, shifted and gated by time and class (adaLN-Zero).

Peebles and Xie 2022, section 3.2, and their public code. Every block starts as the identity and the network as the zero
function, because all modulation and the last layer start at zero. The parameters bear the public code's names. With
`conditioning: attention` the class is a token of the sequence instead, and modulates nothing (Berrada et al. 2024, section 2.1).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fasttrain.cond import Cond
from fasttrain.models import flops
from fasttrain.models.architecture import MODELS
from fasttrain.models.attention import Attention, Rotation
from fasttrain.models.controls import ControlEmbedder, control_flops
from fasttrain.models.embeddings import AxialRotation, LabelEmbedder, TimestepEmbedder, sincos_positions
from fasttrain.models.implementations import AUTOMATIC, Implementations
from fasttrain.models.layers import NORM_EPS, Mlp, PatchEmbed, check_input, unpatchify
from fasttrain.models.modulated import Modulated
from fasttrain.models.modulation import FinalLayer, ModulatedNorm, Modulation, Pending, initialize
from fasttrain.models.network import Network, run_block
from fasttrain.registry import shown


@MODELS.register("dit")
@dataclass(frozen=True, kw_only=True)
class DiT(Modulated):
    """Config of DiT.

    Args:
        conditioning: where the class enters: "adaln", in the vector that modulates, or "attention", as one more token before the patches.
        learn_sigma: keep the public checkpoints' output of 2C channels; only the first C, the prediction, are returned.
        frequency_shift: of the timesteps' sinusoid: 0 as published, 1 as diffusers' DiTTransformer2DModel has it.
        norm_eps: of the norm before each MLP; 1e-6 as published, 1e-5 in diffusers' copies.

    Raises:
        ValueError: as Modulated; or a norm_eps that is not positive.
    """

    conditioning: Literal["adaln", "attention"] = "adaln"
    learn_sigma: bool = False
    frequency_shift: Literal[0, 1] = 0
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"model.norm_eps must lie between 0 and 1, not {shown(self.norm_eps)}")

    @property
    def extra_tokens(self) -> int:
        """The class, where it is a token."""
        return 1 if self.conditioning == "attention" and self.null_label is not None else 0

    @property
    def out_channels(self) -> int:
        """Channels of the last layer."""
        return self.geometry()[0] * (2 if self.learn_sigma else 1)

    def build(self, how: Implementations = AUTOMATIC) -> "DiffusionTransformer":
        return DiffusionTransformer(self, how)

    def flops_per_image(self) -> int:
        inner = flops.blocks(self.width, self.depth, self.tokens) + flops.modulation(self.width, self.depth)
        return inner + control_flops(self) + self.ends_flops(self.tokens, self.patch**2 * self.out_channels)


class Block(nn.Module):
    """x + gate * attention(adaln(x)), then x + gate * mlp(adaln(x)).

    Takes x and what is pending from the block before, and leaves x and its MLP's branch and gate; see Network.
    """

    def __init__(self, config: DiT, how: Implementations):
        super().__init__()
        self.adds_its_own = config.checkpoint_blocks
        self.norm, self.mlp_norm = ModulatedNorm(config, how), ModulatedNorm(config, how, config.norm_eps)
        self.attn = Attention(config.width, config.heads, how, qk_norm=config.qk_norm)
        self.mlp = Mlp(config.width, "tanh", how)
        self.adaLN_modulation = Modulation(config.width, 6)

    def forward(self, x: Tensor, pending: Pending, vector: Tensor, rotation: Rotation | None) -> tuple[Tensor, Pending]:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(vector).chunk(6, dim=1)  # 6 x [B, D]
        x, y = self.norm(x, pending, scale_attn, shift_attn)  # 2 x [B, T, D]
        branch = self.attn(y, rotation)  # [B, T, D]
        x, y = self.mlp_norm(x, (branch, gate_attn), scale_mlp, shift_mlp)  # 2 x [B, T, D]
        branch = self.mlp(y)  # [B, T, D]
        if self.adds_its_own:
            return x + gate_mlp[:, None] * branch, None  # [B, T, D]
        return x, (branch, gate_mlp)


class DiffusionTransformer(Network):
    """model(x [B, C, H, W], t [B] integer or real, cond) -> [B, C, H, W] in the weights' dtype.

    An unconditional model ignores labels, and one without controls ignores those.
    """

    def __init__(self, config: DiT, how: Implementations = AUTOMATIC):
        super().__init__()
        channels, _, num_classes = config.geometry()
        self.config = config
        self.x_embedder = PatchEmbed(channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width, config.frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, config.width) if num_classes else None
        self.control_embedder = ControlEmbedder(config) if config.controls else None
        # A parameter, though never trained, because the public checkpoints hold it.
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.width), requires_grad=False)
        self.rotation = AxialRotation(config.head_width, config.coordinates(), config.extra_tokens) if config.rotary else None
        self.blocks = nn.ModuleList(Block(config, how) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, how, config.patch**2 * config.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        controls = self.control_embedder
        silent = controls.last_layers if controls is not None else []
        initialize(self, (self.t_embedder, self.y_embedder, controls), [self.final_layer.linear, *silent])
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.config.width, self.config.coordinates()))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction for noisy latents.

        Raises:
            ValueError: x or the controls of another shape; labels missing; on a CPU, a label past the table.
        """
        channels, size, _ = self.config.geometry()
        check_input(x, channels, size)
        dtype = self.pos_embed.dtype
        x = self.x_embedder(x).to(dtype) + self.pos_embed  # [B, N, D]
        x, vector = self._conditioned(x, t, cond)  # [B, T, D], [B, D]
        rotation = self.rotation() if self.rotation else None
        pending = None
        for block in self.blocks:
            x, pending = run_block(block, x, pending, vector, rotation, recompute=self.config.checkpoint_blocks)  # [B, T, D]
        x = self.final_layer(x, pending, vector)[:, self.config.extra_tokens :]  # [B, N, p*p*(C or 2C)]
        x = unpatchify(x, self.config.patch, self.config.out_channels)  # [B, C or 2C, H, W]
        return x[:, :channels]  # [B, C, H, W]

    def _conditioned(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The tokens, and the vector that modulates them."""
        vector = self.t_embedder(t, x.dtype)  # [B, D]
        if self.y_embedder is not None:
            if cond.labels is None:
                raise ValueError(f"a class-conditional model needs labels; {self.config.null_label} stands for no class")
            label = self.y_embedder(cond.labels)  # [B, D]
            if self.config.extra_tokens:
                x = torch.cat([label[:, None], x], dim=1)  # [B, 1 + N, D]
            else:
                vector = vector + label  # [B, D]
        controls = self.control_embedder(cond, t, x.dtype) if self.control_embedder is not None else None
        return x, vector if controls is None else vector + controls
