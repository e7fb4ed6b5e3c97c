"""From x0, as a model makes it, to images that people can look at."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.data.config import DataConfig
from fasttrain.data.index import Index
from fasttrain.data.transform import LatentTransform, build_transform
from fasttrain.data.vae import Vae
from fasttrain.errors import UserError


@dataclass(frozen=True, eq=False)
class Decoder:
    """x0 [B, C, H, W] -> images [B, 1 or 3, H', W'] in [-1, 1]; x0 itself where it is pixels.

    Attributes:
        latents: the autoencoder that decodes, and the scaling of its latents; None for pixels.
    """

    latents: tuple[Vae, LatentTransform] | None = None

    def __call__(self, x0: Tensor) -> Tensor:
        if self.latents is None:
            return x0
        vae, transform = self.latents
        return vae.decode(transform.to_latents(x0))

    def image_shape(self, channels: int, side: int) -> tuple[int, int, int]:
        """(H', W', 1 or 3) of what x0 [channels, side, side] becomes."""
        if self.latents is None:
            return side, side, channels
        side *= self.latents[0].downsampling
        return side, side, 3


def decoder(index: Index, data: DataConfig, device: torch.device, revision: str | None = None) -> Decoder | None:
    """What makes images of x0 of this set; None for latents where `data.vae` does not say who decodes them.

    Args:
        revision: of `data.vae`, where it is a hub id; by default that of the set's own.

    Raises:
        UserError: the VAE cannot be loaded, or its latents have another number of channels.
    """
    if index.vae is None:
        return Decoder()
    if data.vae is None:
        return None
    transform = build_transform(index, torch.tensor(0, device=device), normalise=data.normalise)
    assert isinstance(transform, LatentTransform)
    vae = Vae.load(data.vae, revision or index.vae.revision, device)
    if vae.latent_channels != index.x0_shape[0]:
        told = f"decodes latents of {vae.latent_channels} channels, and these samples have {index.x0_shape[0]}"
        raise UserError(f"the VAE {data.vae} {told}: give that of {index.vae.id!r}, which made the training set")
    return Decoder((vae, transform))
