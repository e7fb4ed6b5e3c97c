"""From stored samples to what a training step begins with, on the device: a pure function of (seed, position) and the sample.

images:   x0 = x / 127.5 - 1, mirrored where uniform(seed, position, FLIP) < 1/2
latents:  the posteriors with their scaling, of which x0 is drawn where the noise is added, in the same launch
"""

from dataclasses import dataclass
from typing import Literal

import torch
from fasttrain_kernels.latent_noising import Posterior
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform
from torch import Tensor

from fasttrain.data.index import Index


@dataclass(frozen=True)
class ImageTransform:
    """uint8 pixels to x0 in [-1, 1]; seed [] int64; impl of the operation `uniform`."""

    seed: Tensor
    flip: bool = False
    impl: str = "auto"

    def __call__(self, stored: Tensor, position: Tensor) -> Tensor:
        """Stored [B, C, H, W] uint8 and position [B] int64 -> x0 [B, C, H, W] fp32."""
        x0 = stored.to(torch.float32) / 127.5 - 1
        if self.flip:
            mirrored = uniform(self.seed, position, Purpose.FLIP, impl=self.impl) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        return x0


@dataclass(frozen=True)
class LatentTransform:
    """Stored posteriors to x0: the view is chosen and the posterior sampled anew at each visit; shift, scale [C] fp32."""

    shift: Tensor
    scale: Tensor
    flip: bool = False

    def __call__(self, stored: Tensor, position: Tensor) -> Posterior:
        """Stored [B, 2 views, 2, C, h, w] -> what x0 [B, C, h, w] is drawn from, at any position."""
        return Posterior(stored, self.shift, self.scale, self.flip)

    def to_latents(self, x0: Tensor) -> Tensor:
        """x0 back to what Vae.decode takes: x0 / scale + shift, shape [B, C, h, w]."""
        return x0 / self.scale[:, None, None] + self.shift[:, None, None]


def build_transform(
    index: Index, seed: Tensor, flip: bool = False, normalise: Literal["channel", "vae"] = "channel", impl: str = "auto"
) -> ImageTransform | LatentTransform:
    """The transform of a set of shards, on the seed's device; `impl` of the operation `uniform`, which draws the flips of images."""
    if index.vae is None or index.latent_shift is None or index.latent_scale is None:
        return ImageTransform(seed, flip, impl)
    shift, scale = (torch.tensor(c, dtype=torch.float32, device=seed.device) for c in (index.latent_shift, index.latent_scale))
    if normalise == "vae":
        shift = torch.full_like(shift, index.vae.shift_factor)
        scale = torch.full_like(scale, index.vae.scaling_factor)
    return LatentTransform(shift, scale, flip)
