"""From stored samples to x0, on the device: a pure function of (seed, position) and the sample.

images:   x0 = x / 127.5 - 1
latents:  z = mean + exp(logvar / 2) * normal(seed, position, POSTERIOR),  x0 = (z - shift) * scale
flip:     the mirrored image, or the latents' flipped view, where uniform(seed, position, FLIP) < 1/2
"""

from typing import Literal

import torch
from fasttrain_kernels.philox import Purpose, normal, uniform
from torch import Tensor, nn

from fasttrain.data.index import Index


class ImageTransform(nn.Module):
    """uint8 pixels to x0 in [-1, 1]."""

    def __init__(self, seed: Tensor, flip: bool = False):
        super().__init__()
        self.flip = flip
        self.register_buffer("seed", seed)

    def forward(self, stored: Tensor, position: Tensor) -> Tensor:
        """Stored [B, C, H, W] uint8 and position [B] int64 -> x0 [B, C, H, W] fp32."""
        x0 = stored.to(torch.float32) / 127.5 - 1
        if self.flip:
            x0 = torch.where(flipped(self.seed, position)[:, None, None, None], x0.flip(-1), x0)
        return x0


class LatentTransform(nn.Module):
    """Stored posteriors to x0: the view is chosen and the posterior sampled anew at each visit.

    Args:
        shift, scale: [C] fp32.
        seed: [] int64.
        flip: draw the view; otherwise the plain one.
    """

    def __init__(self, shift: Tensor, scale: Tensor, seed: Tensor, flip: bool = False):
        super().__init__()
        self.flip = flip
        self.register_buffer("seed", seed)
        self.register_buffer("shift", shift.to(torch.float32)[:, None, None])
        self.register_buffer("scale", scale.to(torch.float32)[:, None, None])

    def forward(self, stored: Tensor, position: Tensor) -> Tensor:
        """Stored [B, 2 views, 2, C, h, w] and position [B] int64 -> x0 [B, C, h, w] fp32."""
        posterior = stored[:, 0]  # [B, 2, C, h, w]
        if self.flip:
            posterior = torch.where(flipped(self.seed, position)[:, None, None, None, None], stored[:, 1], posterior)
        mean, logvar = posterior.to(torch.float32).unbind(1)  # [B, C, h, w] each
        z = mean + torch.exp(0.5 * logvar) * normal(self.seed, position, mean.shape[1:], Purpose.POSTERIOR)
        return (z - self.shift) * self.scale

    def to_latents(self, x0: Tensor) -> Tensor:
        """x0 back to what the VAE decodes: x0 / scale + shift, shape [B, C, h, w]."""
        return x0 / self.scale + self.shift


def flipped(seed: Tensor, position: Tensor) -> Tensor:
    """Whether each position is mirrored: bool [B]."""
    return uniform(seed, position, Purpose.FLIP) < 0.5


def build_transform(
    index: Index, seed: Tensor, flip: bool = False, normalise: Literal["channel", "vae"] = "channel"
) -> ImageTransform | LatentTransform:
    """The transform of a set of shards, on the seed's device."""
    if index.vae is None or index.latent_shift is None or index.latent_scale is None:
        return ImageTransform(seed, flip)
    shift, scale = torch.tensor(index.latent_shift), torch.tensor(index.latent_scale)
    if normalise == "vae":
        shift = torch.full_like(shift, index.vae.shift_factor)
        scale = torch.full_like(scale, index.vae.scaling_factor)
    return LatentTransform(shift, scale, seed, flip).to(seed.device)
