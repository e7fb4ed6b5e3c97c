"""The blocks of mmDiT in both its forms: text and image in one sequence of shared layers, or each in a stream of its own.

Both keep adaLN-Zero around joint attention and the MLP. A form's blocks begin with the tokens of text [B, M, D] and image [B, N, D], hand
one another what they need (see Network: tokens, and what is pending to be added to them), and end with tokens of which the last N are the
image's. What they hand on is flat: ZeRO-3 hooks a block's backward pass only to tensors that it takes and gives as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.models.attention import Rotation
from fasttrain.models.implementations import Implementations
from fasttrain.models.joint import JointAttention
from fasttrain.models.layers import Mlp
from fasttrain.models.modulated import Modulated
from fasttrain.models.modulation import ModulatedNorm, Modulation, Pending

Stream = tuple[Tensor, Pending]
"""Tokens [B, ., D], and what is pending to be added to them."""
Streams = tuple[Tensor, Pending, Tensor, Pending]
"""The text's stream, then the image's."""


class SharedAttention(JointAttention):
    """Joint attention of one sequence [B, M + N, D]: QKV for text and image apart, the projection shared."""

    def __init__(self, config: Modulated, how: Implementations):
        super().__init__(config, how)
        self.context_tokens = config.extra_tokens
        self.text_qkv = nn.Linear(config.width, 3 * config.width)
        self.image_qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rotation: Rotation | None, where: Tensor | None) -> Tensor:  # type: ignore[override]
        text, image = x.split([self.context_tokens, x.shape[1] - self.context_tokens], dim=1)  # [B, M, D], [B, N, D]
        out = super().forward(self.text_qkv(text), self.image_qkv(image), rotation, where)  # [B, M + N, D]
        return self.proj(out)  # [B, M + N, D]


class SharedBlock(nn.Module):
    """DiT's block over text and image as one sequence; they differ in their QKV alone (the size of Berrada et al.'s mmDiT)."""

    scale_first = False

    def __init__(self, config: Modulated, how: Implementations, last: bool):
        super().__init__()
        self.adds_its_own = config.checkpoint_blocks
        self.norm = ModulatedNorm(config, how)
        self.attn = SharedAttention(config, how)
        self.mlp = Mlp(config.width, "tanh", how)
        self.adaLN_modulation = Modulation(config.width, 6)

    @staticmethod
    def begin(text: Tensor, image: Tensor) -> Stream:
        """Both as one sequence."""
        return torch.cat([text, image], dim=1), None  # [B, M + N, D]

    @staticmethod
    def end(x: Tensor, pending: Pending) -> Stream:
        """The sequence."""
        return x, pending

    def forward(self, x: Tensor, pending: Pending, vector: Tensor, rotation: Rotation | None, where: Tensor | None) -> Stream:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(vector).chunk(6, dim=1)  # 6 x [B, D]
        x, y = self.norm(x, pending, scale_attn, shift_attn)  # 2 x [B, M + N, D]
        branch = self.attn(y, rotation, where)  # [B, M + N, D]
        x, y = self.norm(x, (branch, gate_attn), scale_mlp, shift_mlp)  # 2 x [B, M + N, D]
        branch = self.mlp(y)  # [B, M + N, D]
        if self.adds_its_own:
            return x + gate_mlp[:, None] * branch, None  # [B, M + N, D]
        return x, (branch, gate_mlp)


class Entered(NamedTuple):
    """A stream between its first norm and its attention's output."""

    x: Tensor  # [B, ., D]
    qkv: Tensor  # [B, ., 3D]
    modulation: tuple[Tensor, ...]  # 4 x [B, D]: gate of the attention; shift, scale and gate of the MLP


class FullStream(nn.Module):
    """The layers that one modality has for itself in a block."""

    def __init__(self, config: Modulated, how: Implementations):
        super().__init__()
        self.adds_its_own = config.checkpoint_blocks
        self.norm = ModulatedNorm(config, how)
        self.adaLN_modulation = Modulation(config.width, 6)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.mlp = Mlp(config.width, "tanh", how)

    def enter(self, x: Tensor, pending: Pending, vector: Tensor) -> Entered:
        """Up to the attention."""
        shift, scale, *others = self.adaLN_modulation(vector).chunk(6, dim=1)  # 6 x [B, D]
        x, y = self.norm(x, pending, scale, shift)  # 2 x [B, ., D]
        return Entered(x, self.qkv(y), tuple(others))

    def leave(self, entered: Entered, attended: Tensor) -> Stream:
        """From the attention's output [B, ., D] on."""
        gate_attn, shift, scale, gate_mlp = entered.modulation
        x, y = self.norm(entered.x, (self.proj(attended), gate_attn), scale, shift)  # 2 x [B, ., D]
        branch = self.mlp(y)  # [B, ., D]
        if self.adds_its_own:
            return x + gate_mlp[:, None] * branch, None  # [B, ., D]
        return x, (branch, gate_mlp)


class LastTextStream(nn.Module):
    """The text's layers in the last block, after which no one reads it: a norm and QKV. Its modulation is (scale, shift), as diffusers'."""

    def __init__(self, config: Modulated, how: Implementations):
        super().__init__()
        self.norm = ModulatedNorm(config, how)
        self.adaLN_modulation = Modulation(config.width, 2)
        self.qkv = nn.Linear(config.width, 3 * config.width)

    def enter(self, x: Tensor, pending: Pending, vector: Tensor) -> Entered:
        """Up to the attention."""
        scale, shift = self.adaLN_modulation(vector).chunk(2, dim=1)  # 2 x [B, D]
        x, y = self.norm(x, pending, scale, shift)  # 2 x [B, M, D]
        return Entered(x, self.qkv(y), ())

    def leave(self, entered: Entered, attended: Tensor) -> Stream:
        """Nothing is made of it."""
        return entered.x, None


class DualBlock(nn.Module):
    """Two full streams that meet in attention alone (Stable Diffusion 3)."""

    scale_first = True

    def __init__(self, config: Modulated, how: Implementations, last: bool):
        super().__init__()
        self.text = LastTextStream(config, how) if last else FullStream(config, how)
        self.image = FullStream(config, how)
        self.attn = JointAttention(config, how)

    @staticmethod
    def begin(text: Tensor, image: Tensor) -> Streams:
        """Both as they are."""
        return text, None, image, None

    @staticmethod
    def end(text: Tensor, text_pending: Pending, image: Tensor, image_pending: Pending) -> Stream:
        """The image's stream."""
        return image, image_pending

    def forward(
        self,
        text: Tensor,
        text_pending: Pending,
        image: Tensor,
        image_pending: Pending,
        vector: Tensor,
        rotation: Rotation | None,
        where: Tensor | None,
    ) -> Streams:
        told, shown = self.text.enter(text, text_pending, vector), self.image.enter(image, image_pending, vector)
        out = self.attn(told.qkv, shown.qkv, rotation, where)  # [B, M + N, D]
        text_out, image_out = out.split([text.shape[1], image.shape[1]], dim=1)  # [B, M, D], [B, N, D]
        return *self.text.leave(told, text_out), *self.image.leave(shown, image_out)


FORMS: dict[str, type[SharedBlock] | type[DualBlock]] = {"shared": SharedBlock, "dual": DualBlock}
"""The block of each form."""
