"""Weights of another grid, patch or number of outputs: pure functions of tensors, computed in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resampled_positions(learned: Tensor, extra: int, grid: int) -> Tensor:
    """Learned positions of patches, resampled bicubically for another grid; those of other tokens stay as they are.

    Args:
        learned: [1, extra + g * g, D], patches last, in raster order.
        extra: tokens that are not patches.
        grid: patches along one side of the new grid.

    Returns:
        [1, extra + grid * grid, D] fp32.
    """
    old = round((learned.shape[1] - extra) ** 0.5)
    patches = learned[:, extra:].double().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, D, g, g]
    # Without antialiasing torch takes another cubic, which bends even a plane.
    resized = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False, antialias=True)  # [1, D, grid, grid]
    return torch.cat([learned[:, :extra].float(), resized.flatten(2).transpose(1, 2).float()], dim=1)  # [1, extra + grid * grid, D]


def resize_matrix(old: int, new: int) -> Tensor:
    """B [new * new, old * old] float64 that resizes a patch bilinearly: patch' = B patch, in raster order."""
    units = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    resized = F.interpolate(units, size=(new, new), mode="bilinear", align_corners=False, antialias=new < old)
    return resized.flatten(1).T  # [new * new, old * old]


def resized_embedding(weight: Tensor, patch: int) -> Tensor:
    """A patch embedding [D, C, p, p] for another patch: <w', B x> = <w, x> for every patch x, w' the least such.

    w' = pinv(B^T) w      [Beyer et al. 2023, FlexiViT, section 3.4]; exact where the patch grows, the least squares where it shrinks.

    Returns:
        [D, C, patch, patch] fp32.
    """
    back = torch.linalg.pinv(resize_matrix(weight.shape[-1], patch).T)  # [patch * patch, p * p]
    return (weight.double().flatten(2) @ back.T).unflatten(2, (patch, patch)).float()


def resized_outputs(rows: Tensor, old: int, new: int, channels: int) -> Tensor:
    """The last layer's weight or bias [p * p * C, ...] for another patch: its predicted patches, resized.

    Returns:
        [new * new * C, ...] fp32.
    """
    pixels = rows.double().unflatten(0, (old * old, channels))  # [p * p, C, ...]
    return torch.tensordot(resize_matrix(old, new), pixels, dims=1).flatten(0, 1).float()  # [new * new * C, ...]


def outputs_of(rows: Tensor, patch: int, old: int, new: int) -> Tensor:
    """The last layer's weight or bias [p * p * C, ...], channel last, for `new` channels instead of `old`: the first ones, then zeros.

    Returns:
        [p * p * new, ...].
    """
    pixels = rows.unflatten(0, (patch * patch, old))[:, :new]  # [p * p, min(C, new), ...]
    missing = pixels.new_zeros(pixels.shape[0], new - pixels.shape[1], *pixels.shape[2:])
    return torch.cat([pixels, missing], dim=1).flatten(0, 1)  # [p * p * new, ...]
