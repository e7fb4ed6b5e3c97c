"""From stored samples to x0, on the device: a pure function of (seed, position) and the sample.

images:   x0 = x / 127.5 - 1
latents:  z = mean + exp(logvar / 2) * normal(seed, position, POSTERIOR),  x0 = (z - shift) * scale
flip:     the mirrored image, or the latents' flipped view, where uniform(seed, position, FLIP) < 1/2
"""

from dataclasses import dataclass
from typing import Literal

import torch
from fasttrain_kernels.philox import Purpose, normal
from fasttrain_kernels.uniform import uniform
from torch import Tensor

from fasttrain.data.index import Index


@dataclass(frozen=True)
class ImageTransform:
    """uint8 pixels to x0 in [-1, 1]; seed [] int64."""

    seed: Tensor
    flip: bool = False

    def __call__(self, stored: Tensor, position: Tensor) -> Tensor:
        """Stored [B, C, H, W] uint8 and position [B] int64 -> x0 [B, C, H, W] fp32."""
        x0 = stored.to(torch.float32) / 127.5 - 1
        if self.flip:
            x0 = torch.where(flipped(self.seed, position)[:, None, None, None], x0.flip(-1), x0)
        return x0


@dataclass(frozen=True)
class LatentTransform:
    """Stored posteriors to x0: the view is chosen and the posterior sampled anew at each visit; shift, scale [C] fp32; seed [] int64."""

    shift: Tensor
    scale: Tensor
    seed: Tensor
    flip: bool = False

    def __call__(self, stored: Tensor, position: Tensor) -> Tensor:
        """Stored [B, 2 views, 2, C, h, w] and position [B] int64 -> x0 [B, C, h, w] fp32."""
        posterior = stored[:, 0]  # [B, 2, C, h, w]
        if self.flip:
            posterior = torch.where(flipped(self.seed, position)[:, None, None, None, None], stored[:, 1], posterior)
        mean, logvar = posterior.to(torch.float32).unbind(1)  # [B, C, h, w] each
        z = mean + torch.exp(0.5 * logvar) * normal(self.seed, position, mean.shape[1:], Purpose.POSTERIOR)
        return (z - self.shift[:, None, None]) * self.scale[:, None, None]

    def to_latents(self, x0: Tensor) -> Tensor:
        """x0 back to what Vae.decode takes: x0 / scale + shift, shape [B, C, h, w]."""
        return x0 / self.scale[:, None, None] + self.shift[:, None, None]


def flipped(seed: Tensor, position: Tensor) -> Tensor:
    """Whether each position is mirrored: bool [B]."""
    return uniform(seed, position, Purpose.FLIP) < 0.5


def build_transform(
    index: Index, seed: Tensor, flip: bool = False, normalise: Literal["channel", "vae"] = "channel"
) -> ImageTransform | LatentTransform:
    """The transform of a set of shards, on the seed's device."""
    if index.vae is None or index.latent_shift is None or index.latent_scale is None:
        return ImageTransform(seed, flip)
    shift, scale = (torch.tensor(c, dtype=torch.float32, device=seed.device) for c in (index.latent_shift, index.latent_scale))
    if normalise == "vae":
        shift = torch.full_like(shift, index.vae.shift_factor)
        scale = torch.full_like(scale, index.vae.scaling_factor)
    return LatentTransform(shift, scale, seed, flip)
