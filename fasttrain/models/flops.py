"""Floating-point operations of a forward pass, from the shapes alone; a multiply-add counts as 2.

With width D, T tokens and L blocks: 24 D^2 T L for the matrices (8 for qkv and projection, 16 for the MLP),
4 T^2 D L for the two attention products, 12 D^2 L for six modulation vectors per image and block. Norms, activations
and residuals, under 1 %, are left out, as in published figures. (DiT's paper prints multiply-adds: half of these.)
"""

TRAINING = 3  # the backward pass takes two products where the forward takes one; recomputation is not counted


def blocks(width: int, depth: int, tokens: int) -> int:
    """24 D^2 T L + 4 T^2 D L: attention and MLP of `depth` pre-norm blocks with an MLP ratio of 4."""
    return 24 * width**2 * tokens * depth + 4 * tokens**2 * width * depth


def modulation(width: int, depth: int) -> int:
    """12 D^2 L: the linear layer from the conditioning vector to six modulation vectors, once per image and block."""
    return 12 * width**2 * depth


def patches(width: int, patch: int, channels: int, count: int) -> int:
    """2 p^2 C D N: one matrix between patches of `channels` channels and tokens, for `count` patches."""
    return 2 * patch**2 * channels * width * count


def linear(inputs: int, outputs: int) -> int:
    """2 m n: one vector through one matrix."""
    return 2 * inputs * outputs
