"""From x0, as a model makes it, to images that people can look at."""

from collections.abc import Callable

import torch
from torch import Tensor

from fasttrain.data.config import DataConfig
from fasttrain.data.index import Index
from fasttrain.data.transform import LatentTransform, build_transform
from fasttrain.data.vae import Vae


def decoder(index: Index, data: DataConfig, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """x0 [B, C, H, W] -> images [B, 1 or 3, H', W'] in [-1, 1]; None for latents where `data.vae` does not say who decodes them.

    Raises:
        UserError: the VAE cannot be loaded.
    """
    if index.vae is None:
        return lambda x0: x0
    if data.vae is None:
        return None
    transform = build_transform(index, torch.tensor(0, device=device), normalise=data.normalise)
    assert isinstance(transform, LatentTransform)
    vae = Vae.load(data.vae, index.vae.revision, device)
    return lambda x0: vae.decode(transform.to_latents(x0))
