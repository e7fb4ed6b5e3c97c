"""Adaptive norms: what a vector made of time (and class, and controls) does to tokens, and how networks made of them start.

Peebles and Xie 2022, section 3.2 (adaLN-Zero), and their public code: shift, scale and gate are linear in the vector, and zero at first.
"""

from collections.abc import Iterable, Sequence

import torch
from fasttrain_kernels.adaln import adaln
from fasttrain_kernels.gated_adaln import gated_adaln
from torch import Tensor, nn

from fasttrain.models.implementations import Implementations
from fasttrain.models.layers import NORM_EPS
from fasttrain.models.modulated import Modulated

Pending = tuple[Tensor, Tensor] | None
"""A branch [B, N, D] still to be added to the tokens, and its gate [B, D]; None where there is none."""


class Modulation(nn.Sequential):
    """SiLU and a linear layer: from the conditioning vector [B, D] to `count` vectors [B, count * D]."""

    def __init__(self, width: int, count: int):
        super().__init__(nn.SiLU(), nn.Linear(width, count * width))


class ModulatedNorm(nn.Module):
    """The end of one branch and the adaptive norm before the next, in one pass; no parameters of its own."""

    def __init__(self, config: Modulated, how: Implementations, eps: float = NORM_EPS):
        super().__init__()
        self.norm, self.eps = config.norm, eps
        self.plain, self.gated = how.kernels.of("adaln"), how.kernels.of("gated_adaln")

    def forward(self, x: Tensor, pending: Pending, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """x with its pending branch added, and the same normalised and modulated: 2 x [B, N, D]."""
        if pending is None:
            return x, adaln(x, scale, shift, norm=self.norm, eps=self.eps, impl=self.plain)
        branch, gate = pending
        # A branch comes in x's dtype by itself, except under autocast.
        return gated_adaln(x, branch.to(x.dtype), gate, scale, shift, norm=self.norm, eps=self.eps, impl=self.gated)


class FinalLayer(nn.Module):
    """linear(adaln(x)): tokens to patches.

    Args:
        outputs: values of a patch.
        scale_first: the modulation is (scale, shift), as in diffusers' SD3, and not DiT's (shift, scale).
    """

    def __init__(self, config: Modulated, how: Implementations, outputs: int, *, scale_first: bool = False):
        super().__init__()
        self.scale_first = scale_first
        self.norm = ModulatedNorm(config, how)
        self.linear = nn.Linear(config.width, outputs)
        self.adaLN_modulation = Modulation(config.width, 2)

    def forward(self, x: Tensor, pending: Pending, vector: Tensor) -> Tensor:
        first, second = self.adaLN_modulation(vector).chunk(2, dim=1)  # 2 x [B, D]
        scale, shift = (first, second) if self.scale_first else (second, first)
        _, x = self.norm(x, pending, scale, shift)  # [B, N, D]
        return self.linear(x)  # [B, N, p*p*C]


def initialize(network: nn.Module, embedders: Iterable[nn.Module | None], zero: Sequence[nn.Module]) -> None:
    """DiT's first weights: xavier uniform, N(0, 0.02) in the embedders, and zero in every modulation and the layers of `zero`.

    Zero gates make every block the identity at the start; a zero last layer makes the first prediction zero.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            # The patch convolution is a matrix from p*p*C values to D: its fans are that matrix's, not a convolution's.
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in (layer for embedder in embedders if embedder is not None for layer in embedder.modules()):
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
    silent = [*zero, *(layer for layer in network.modules() if isinstance(layer, Modulation))]
    with torch.no_grad():
        for parameter in (parameter for layer in silent for parameter in layer.parameters()):
            parameter.zero_()
