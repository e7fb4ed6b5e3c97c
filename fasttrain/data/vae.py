"""Stable Diffusion's kind of autoencoder, through diffusers: the only file that imports it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.index import VaeRecord
from fasttrain.data.pretrained import first_line, folder_digest, pinned
from fasttrain.errors import UserError

# What diffusers clamps log-variances to [DiagonalGaussianDistribution], so that exp never overflows.
_LOGVAR_LIMITS = (-30.0, 20.0)


class Vae:
    """An autoencoder in fp32: images in [-1, 1] to posteriors, latents to images. Its record says which weights these are."""

    def __init__(self, model: Any, record: VaeRecord):
        self.model = model
        self.record = record

    @classmethod
    def load(cls, name: str, revision: str | None = None, device: torch.device | str = "cpu") -> "Vae":
        """An AutoencoderKL from a folder, or from the Hugging Face hub at a pinned revision.

        Args:
            name: folder with config.json and safetensors weights, or a hub id (owner/name).
            revision: commit hash, 40 hexadecimal digits; needed for a hub id, since a branch may move.
            device: where it computes.

        Raises:
            UserError: diffusers is absent, no such folder, not an autoencoder, or a hub id without its commit.
        """
        commit = pinned("--vae", name, revision, "an AutoencoderKL")
        model = _autoencoder(name, commit)
        config = model.config
        record = VaeRecord(
            id=Path(name).resolve().name if commit is None else name,
            revision=commit,
            xxh3=folder_digest(Path(name)) if commit is None else None,
            scaling_factor=float(config.scaling_factor),
            shift_factor=float(config.get("shift_factor") or 0.0),
        )
        return cls(model.to(device).eval().requires_grad_(False), record)

    @property
    def downsampling(self) -> int:
        """Pixels a side for one latent: 8 for Stable Diffusion's."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """C of the latents: 4 for Stable Diffusion's."""
        return int(self.model.config.latent_channels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Posteriors of images: [B, 3, H, W] in [-1, 1] -> fp32 [B, 2, C, h, w], mean and log-variance, without any scaling."""
        posterior = self.model.encode(images.to(self.model.device, torch.float32)).latent_dist
        return torch.stack([posterior.mean, posterior.logvar.clamp(*_LOGVAR_LIMITS)], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of unscaled latents (what LatentTransform.to_latents gives): [B, C, h, w] -> fp32 [B, 3, H, W] in [-1, 1]."""
        return self.model.decode(latents.to(self.model.device, torch.float32)).sample.clamp(-1, 1)


def _autoencoder(name: str, revision: str | None) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"--vae needs diffusers ({error}): pip install 'fasttrain[latents]'") from None
    try:
        # Safetensors only: the other format is a pickle, which runs code.
        return AutoencoderKL.from_pretrained(
            name,
            revision=revision,
            local_files_only=revision is None,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--vae {name}: not an AutoencoderKL with safetensors weights ({first_line(error)})") from None
