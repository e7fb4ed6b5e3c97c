"""mmDiT: text or class tokens and image patches in one attention; time, and controls, modulate.

Esser et al. 2024 (Stable Diffusion 3) and Berrada et al. 2024, who found it the best of five architectures. Semantics enter through
attention, controls through the norms, so that neither disturbs the other. `shared` is the second paper's size: QKV for text and image
apart, everything else shared. `dual` is Stable Diffusion 3's two full streams, one-to-one with diffusers' SD3Transformer2DModel.
Every block starts as the identity and the network as the zero function, as DiT's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasttrain.cond import Cond, Text
from fasttrain.errors import UserError
from fasttrain.models import flops
from fasttrain.models.architecture import LARGEST, MODELS
from fasttrain.models.attention import ragged_attention
from fasttrain.models.controls import ControlEmbedder, control_flops
from fasttrain.models.embeddings import AxialRotation, LabelEmbedder, TimestepEmbedder, grid_coordinates, sincos_positions
from fasttrain.models.implementations import AUTOMATIC, Implementations
from fasttrain.models.layers import PatchEmbed, check_input, unpatchify
from fasttrain.models.modulated import Modulated
from fasttrain.models.modulation import FinalLayer, initialize
from fasttrain.models.multimodal_blocks import FORMS
from fasttrain.models.network import Network, run_block
from fasttrain.models.ragged import own_last
from fasttrain.registry import shown


@MODELS.register("mmdit")
@dataclass(frozen=True, kw_only=True)
class MmDiT(Modulated):
    """Config of mmDiT. With a text width it is a text model, and classes do not reach it; without one, the class is its one token.

    Args:
        form: "shared" layers but for QKV, or "dual" streams.
        text_tokens: M, places for a caption's tokens; None, like the next two: a class model, or as the data's text says.
        text_width: E, of a token of the text encoder.
        text_pooled: P, of the encoder's vector of a whole caption.
        pooled: add that vector to what modulates; None: where the form is dual. Without it semantics enter through attention alone.
        masked_text: attention sees only a caption's own tokens, `Cond.text.length` of them; otherwise all M, as padding fills them.
        position_table: the positions are the middle of a table for this many patches a side, spread over position_base (by default the
            grid): pos_embed_max_size of diffusers' SD3.

    Raises:
        ValueError: as Modulated; or numbers that are not positive, half of a text's shape, or a table smaller than the grid.
    """

    form: Literal["shared", "dual"] = "shared"
    qk_norm: bool = True
    text_tokens: int | None = None
    text_width: int | None = None
    text_pooled: int | None = None
    pooled: bool | None = None
    masked_text: bool = False
    position_table: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("text_tokens", "text_width", "text_pooled", "position_table"):
            value = getattr(self, key)
            if value is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"model.{key} must be at least 1 and at most {LARGEST}, not {shown(value)}")
        if (self.text_tokens is None) != (self.text_width is None):
            raise ValueError("model.text_tokens and model.text_width belong together: set both, or neither")
        if self.position_table is not None and self.input_size is not None and self.position_table < self.input_size // self.patch:
            side = self.input_size // self.patch
            raise ValueError(f"model.position_table {self.position_table} is smaller than the grid, {side} patches a side")

    @property
    def takes_text(self) -> bool:
        """Whether captions condition it, and not classes."""
        return self.text_width is not None

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class"; None for a text model."""
        return None if self.takes_text else super().null_label

    @property
    def pooled_width(self) -> int | None:
        """P where the pooled vector modulates, else None.

        Raises:
            UserError: it should, and its width is not known.
        """
        wanted = self.form == "dual" if self.pooled is None else self.pooled
        if not (wanted and self.takes_text):
            return None
        if self.text_pooled is None:
            raise UserError("model.text_pooled: not set and not yet taken from the data's text; give a value, or set model.pooled to false")
        return self.text_pooled

    @property
    def extra_tokens(self) -> int:
        """M, or 1 for the class.

        Raises:
            UserError: there is neither text nor class.
        """
        if self.text_tokens is not None:
            return self.text_tokens
        if self.null_label is None:
            raise UserError("mmdit needs text or classes, and has neither: give the data captions or labels, or choose model dit")
        return 1

    @property
    def ragged_tokens(self) -> int:
        """M where attention passes over padding."""
        return self.extra_tokens if self.masked_text and self.takes_text else 0

    def coordinates(self) -> Tensor:
        """[grid] float64: where the patches along one side are."""
        return grid_coordinates(self.grid, self.position_base, self.position_table)

    def build(self, how: Implementations = AUTOMATIC) -> "MultimodalTransformer":
        return MultimodalTransformer(self, how)

    def flops_per_image(self) -> int:
        width, context = self.width, self.extra_tokens
        inner = flops.blocks(width, self.depth, self.tokens) + flops.modulation(width, self.depth)
        if self.form == "dual":
            # The text has its own modulation, and in the last block two vectors, no projection and no MLP.
            inner += flops.modulation(width, self.depth - 1) + flops.linear(width, 2 * width) - context * 18 * width**2
        captions = context * flops.linear(self.text_width, width) if self.text_width is not None else 0
        pooled = self.pooled_width
        captions += flops.linear(pooled, width) + flops.linear(width, width) if pooled is not None else 0
        last = self.tokens if self.form == "shared" else self.grid**2
        return inner + captions + control_flops(self) + self.ends_flops(last, self.patch**2 * self.geometry()[0])


class MultimodalTransformer(Network):
    """model(x [B, C, H, W], t [B] integer or real, cond) -> [B, C, H, W] in the weights' dtype."""

    positions: Tensor

    def __init__(self, config: MmDiT, how: Implementations = AUTOMATIC):
        super().__init__()
        channels, _, num_classes = config.geometry()
        width, pooled = config.width, config.pooled_width
        self.config = config
        self.x_embedder = PatchEmbed(channels, config.patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = None if config.takes_text else LabelEmbedder(num_classes, width)
        self.context_embedder = nn.Linear(config.text_width, width) if config.text_width is not None else None
        self.pooled_embedder = None if pooled is None else nn.Sequential(nn.Linear(pooled, width), nn.SiLU(), nn.Linear(width, width))
        self.control_embedder = ControlEmbedder(config) if config.controls else None
        line, block = config.coordinates(), FORMS[config.form]
        # A function of the shapes, and so not in the state dict.
        self.register_buffer("positions", sincos_positions(width, line)[None], persistent=False)
        self.rotation = AxialRotation(config.head_width, line) if config.rotary else None
        self.blocks = nn.ModuleList(block(config, how, number == config.depth - 1) for number in range(config.depth))
        self.final_layer = FinalLayer(config, how, config.patch**2 * channels, scale_first=block.scale_first)
        self.begin: Callable[..., Any] = block.begin
        self.end: Callable[..., Any] = block.end
        self.ragged = ragged_attention(how.attention, how.deterministic, how.packed) if config.ragged_tokens else None
        self._initialize()

    def _initialize(self) -> None:
        controls = self.control_embedder
        silent = controls.last_layers if controls is not None else []
        embedders = (self.t_embedder, self.y_embedder, self.pooled_embedder, controls)
        initialize(self, embedders, [self.final_layer.linear, *silent])

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction for noisy latents.

        Raises:
            ValueError: x, the text or the controls of another shape; labels or text missing; on a CPU, a label past the table.
        """
        channels, size, _ = self.config.geometry()
        check_input(x, channels, size)
        dtype = self.final_layer.linear.weight.dtype
        image = self.x_embedder(x).to(dtype) + self.positions.to(dtype)  # [B, N, D]
        context, where = self._context(cond, dtype)  # [B, M, D]
        vector = self._vector(t, cond, dtype)  # [B, D]
        rotation = self.rotation() if self.rotation else None
        state = self.begin(context, image)
        for block in self.blocks:
            state = run_block(block, *state, vector, rotation, where, recompute=self.config.checkpoint_blocks)
        x = self.final_layer(*self.end(*state), vector)[:, -image.shape[1] :]  # [B, N, p*p*C]
        return unpatchify(x, self.config.patch, channels)  # [B, C, H, W]

    def _vector(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """What modulates: time, the pooled caption, controls."""
        vector = self.t_embedder(t, dtype)  # [B, D]
        if self.pooled_embedder is not None and cond.text is not None:
            vector = vector + self.pooled_embedder(cond.text.pooled.to(dtype))  # [B, D]
        controls = self.control_embedder(cond, t, dtype) if self.control_embedder is not None else None
        return vector if controls is None else vector + controls

    def _context(self, cond: Cond, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The tokens of text or class, and which of all tokens are padding, as attention wants it."""
        if self.context_embedder is None:
            if self.y_embedder is None or cond.labels is None:
                raise ValueError(f"a class-conditional model needs labels; {self.config.null_label} stands for no class")
            return self.y_embedder(cond.labels)[:, None].to(dtype), None  # [B, 1, D]
        text = self._checked(cond.text)
        if self.ragged is None:
            return self.context_embedder(text.tokens.to(dtype)), None  # [B, M, D]
        where = self.ragged.where(text.length, text.tokens.shape[1], self.config.grid**2)
        return self.context_embedder(own_last(text.tokens, text.length).to(dtype)), where  # [B, M, D]

    def _checked(self, text: Text | None) -> Text:
        if text is None:
            raise ValueError("a text model needs captions; the encoding of the empty one stands for none")
        self._require("tokens", text.tokens, self.config.text_tokens, self.config.text_width)
        if self.pooled_embedder is not None:
            self._require("pooled vectors", text.pooled, self.config.text_pooled)
        return text

    @staticmethod
    def _require(what: str, given: Tensor, *shape: int | None) -> None:
        if given.shape[1:] != shape:
            wanted = ", ".join(map(str, shape))
            told = f"the model takes {what} [B, {wanted}], got {list(given.shape)}"
            raise ValueError(f"a prompt in the wrong encoder's shape: {told}")
