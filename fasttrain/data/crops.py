"""Squares cut out of images at random, and their exact reduction to the side that a model sees.

    area = low + (high - low) u0,  side = round(short sqrt(area))
    top = floor(u1 (height - side + 1)),  left = floor(u2 (width - side + 1))

`area` is a share of the largest square's: torchvision's RandomResizedCrop, with squares alone. u0 .. u2 are Philox's for (seed, position,
CROP). In training a square of the stored image is averaged over areas to the model's side m, by integers that float64 holds exactly:

    x[i, j] = 1 / side^2  sum_ab o(i, a) o(j, b) pixel[a, b],   o(i, a) = m |[top + i side / m, top + (i + 1) side / m] and [a, a + 1]|

so that the bits depend on no batch, device or order of summation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from fasttrain_kernels.philox import Purpose, philox
from torch import Tensor

from fasttrain.data.config import DataConfig
from fasttrain.data.index import Index
from fasttrain.errors import UserError

Scale = tuple[float, float]


def boxes(seed: int, positions: np.ndarray, height: int, width: int, scale: Scale) -> np.ndarray:
    """Squares inside height x width images: int64 positions [n] -> int64 [n, 3]: side, top and left."""
    draws = philox(seed, 0, Purpose.CROP, torch.from_numpy(np.asarray(positions, np.int64)))
    share, down, across = (draw.numpy() / 2.0**32 for draw in draws[:3])
    short, (low, high) = min(height, width), scale
    side = np.clip(np.rint(short * np.sqrt(low + (high - low) * share)), 1, short)
    return np.stack([side, np.floor(down * (height - side + 1)), np.floor(across * (width - side + 1))], axis=-1).astype(np.int64)


@dataclass(frozen=True)
class Crops:
    """What training sees of stored squares: `size` pixels a side, of crops of `scale` of their area."""

    seed: int
    stored: int
    size: int
    scale: Scale

    def boxes(self, positions: np.ndarray) -> np.ndarray:
        """The crop of each position: int64 [n] -> int64 [n, 3]: side, top and left in stored pixels."""
        return boxes(self.seed, positions, self.stored, self.stored, self.scale)

    def cut(self, images: Tensor, box: Tensor) -> Tensor:
        """uint8 images [B, C, S, S] and boxes [B, 3] -> fp32 [B, C, size, size] in 0 .. 255. Takes 8 bytes a stored value meanwhile."""
        side, top, left = box.unbind(1)
        rows, columns = (self._overlaps(first, side)[:, None] for first in (top, left))  # [B, 1, size, S] each
        sums = rows @ images.to(torch.float64) @ columns.transpose(-1, -2)  # [B, C, size, size]
        return (sums / side.double()[:, None, None, None] ** 2).float()

    def _overlaps(self, first: Tensor, side: Tensor) -> Tensor:
        """How much each output pixel takes of each stored one along an axis, in parts of 1 / size of it: float64 [B, size, S]."""
        start = first[:, None] * self.size + torch.arange(self.size, device=first.device) * side[:, None]  # [B, size]
        stored = torch.arange(self.stored, device=first.device) * self.size  # [S]
        stop = torch.minimum((start + side[:, None])[:, :, None], stored + self.size)
        return (stop - torch.maximum(start[:, :, None], stored)).clamp(min=0).double()


def crops_of(config: DataConfig, index: Index, seed: int) -> Crops | None:
    """How training cuts this set's images; None where it sees them as they are stored.

    Raises:
        UserError: crops of what cannot be cropped, or smaller than what the model sees.
    """
    stored, size, scale = index.x0_shape[-1], config.size, config.crop_scale
    if size is None and scale is None:
        return None
    if index.kind == "latent":
        key, option = ("data.size", "--size") if scale is None else ("data.crop_scale", "--crop random --crop-scale LOW HIGH")
        raise UserError(f"{key}: {config.train} holds latents, which are not cropped or resized: prepare them with {option}")
    if index.layout == "members":
        if scale is not None:
            raise UserError(f"data.crop_scale: {config.train} is made elsewhere; make shards of it with `fasttrain prepare images`")
        return None
    if size is None:
        raise UserError("data.crop_scale needs data.size: the side, in pixels, that crops are resized to")
    low, high = scale or (1.0, 1.0)
    smallest = round(stored * low**0.5)
    if smallest < size:
        what = f"images of {stored} pixels" if scale is None else f"crops from {smallest} pixels on, of images of {stored},"
        raise UserError(f"data.size {size}: {config.train} gives {what} and nothing is enlarged: prepare it with a larger --size")
    return Crops(seed, stored, size, (low, high)) if (size, low) != (stored, 1.0) else None
