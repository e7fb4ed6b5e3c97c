"""Stable Diffusion's kind of autoencoder, through diffusers: the only file that imports it."""

import re
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from fasttrain.data.index import VaeRecord
from fasttrain.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
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
        folder = Path(name)
        local = folder.is_dir()
        if not local:
            _check_hub_id(name, revision)
        model = _autoencoder(name, None if local else revision)
        config = model.config
        record = VaeRecord(
            id=folder.resolve().name if local else name,
            revision=None if local else revision,
            xxh3=_folder_digest(folder) if local else None,
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


def _check_hub_id(name: str, revision: str | None) -> None:
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"--vae {name}: no such folder, nor a hub id (owner/name); give the folder of an AutoencoderKL")
    if revision is None or not _COMMIT.fullmatch(revision):
        told = f"--vae {name}: no such folder here; as a hub id it needs --vae-revision with the commit's 40 hexadecimal digits"
        raise UserError(f"{told}{f' (got {revision!r})' if revision else ''}, because a branch may change")


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
        raise UserError(f"--vae {name}: not an AutoencoderKL with safetensors weights ({str(error).splitlines()[0]})") from None


def _folder_digest(folder: Path) -> str:
    """xxh3 of the names and content of a model's files: which weights these are, wherever the folder lies."""
    hasher = xxhash.xxh3_128()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        hasher.update(path.name.encode() + b"\0")
        hasher.update(path.read_bytes())
    return hasher.hexdigest()
