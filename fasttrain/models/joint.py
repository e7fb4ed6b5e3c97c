"""Joint attention: the tokens of text and image, each with queries, keys and values of its own, attend to one another as one sequence.

Esser et al. 2024 (Stable Diffusion 3), Figure 2. The text's tokens come first. With RMSNorm of queries and keys, text and image each with
weights of their own, the joint q, k and v are written once, straight from the two packed qkv matrices.
"""

import torch
from fasttrain_kernels.joint_qk_norm import joint_qk_norm
from torch import Tensor, nn

from fasttrain.models.architecture import Transformer
from fasttrain.models.attention import Rotation, attention_function, ragged_attention
from fasttrain.models.implementations import Implementations


class JointQkNorm(nn.Module):
    """RMSNorm of the queries and keys of each head of text and image, the image's rotation, and both as one sequence."""

    def __init__(self, head_width: int, how: Implementations):
        super().__init__()
        self.q_weight_text = nn.Parameter(torch.ones(head_width))
        self.k_weight_text = nn.Parameter(torch.ones(head_width))
        self.q_weight_image = nn.Parameter(torch.ones(head_width))
        self.k_weight_image = nn.Parameter(torch.ones(head_width))
        self.impl = how.kernels.of("joint_qk_norm")

    def forward(self, text: Tensor, image: Tensor, heads: int, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.q_weight_text, self.k_weight_text, self.q_weight_image, self.k_weight_image
        cos, sin = rotation or (None, None)
        return joint_qk_norm(text, image, *weights, heads=heads, cos=cos, sin=sin, impl=self.impl)  # 3 x [B, h, M + N, d]


class JointAttention(nn.Module):
    """Attention from the packed qkv matrices of text [B, M, 3D] and image [B, N, 3D] to both, [B, M + N, D]."""

    def __init__(self, config: Transformer, how: Implementations):
        super().__init__()
        self.heads = config.heads
        self.attend = attention_function(how.attention, how.deterministic)
        self.ragged = ragged_attention(how.attention, how.deterministic, how.packed) if config.ragged_tokens else None
        self.qk_norm = JointQkNorm(config.head_width, how) if config.qk_norm else None

    def forward(self, text: Tensor, image: Tensor, rotation: Rotation | None, where: Tensor | None) -> Tensor:
        """`where` says which tokens are padding, in the words of `ragged`; None: none is."""
        q, k, v = self._heads(text, image, rotation)  # 3 x [B, h, M + N, d]
        out = self.attend(q, k, v) if self.ragged is None or where is None else self.ragged(q, k, v, where)  # [B, h, M + N, d]
        return out.transpose(1, 2).flatten(2)  # [B, M + N, D]

    def _heads(self, text: Tensor, image: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.qk_norm is not None:
            return self.qk_norm(text, image, self.heads, rotation)
        q, k, v = torch.cat([text, image], dim=1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, h, M + N, d]
        return q, k, v
