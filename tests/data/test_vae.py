"""The autoencoder: what it gives, what its record says, and what it refuses."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from fasttrain.data.vae import Vae
from fasttrain.errors import UserError


def test_encode_gives_mean_and_log_variance(vae_folder: Path):
    vae, images = Vae.load(str(vae_folder)), torch.rand(3, 3, 16, 24) * 2 - 1
    encoded = vae.encode(images)
    assert encoded.shape == (3, 2, 4, 8, 12) and encoded.dtype == torch.float32
    with torch.no_grad():
        posterior = vae.model.encode(images).latent_dist
    torch.testing.assert_close(encoded, torch.stack([posterior.mean, posterior.logvar], 1), rtol=0, atol=0)


def test_decode_gives_images(vae_folder: Path):
    vae = Vae.load(str(vae_folder))
    images = vae.decode(10 * torch.randn(2, 4, 8, 8))
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert (vae.downsampling, vae.latent_channels) == (2, 4)


def test_the_record_is_of_the_content_not_of_the_place(vae_folder: Path, tmp_path: Path):
    record = Vae.load(str(vae_folder)).record
    assert (record.id, record.revision, record.scaling_factor) == ("tiny-vae", None, 0.18215)
    moved = Path(shutil.copytree(vae_folder, tmp_path / "tiny-vae"))
    assert Vae.load(str(moved)).record == record
    config = (moved / "config.json").read_text()
    (moved / "config.json").write_text(config.replace("0.18215", "0.5"))
    assert Vae.load(str(moved)).record.xxh3 != record.xxh3


@pytest.mark.parametrize(
    ("name", "revision", "told"),
    [
        ("nowhere/at/all", None, "no such folder, nor a hub id"),
        ("owner/name", None, r"owner/name: no such folder here; as a hub id it needs --vae-revision"),
        ("owner/name", "main", r"'main'\), because a branch may change"),
    ],
)
def test_unknown_vaes(name: str, revision: str | None, told: str):
    with pytest.raises(UserError, match=told):
        Vae.load(name, revision)


def test_a_folder_that_holds_no_vae(tmp_path: Path):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'fasttrain[latents]'")
    with pytest.raises(UserError, match="not an AutoencoderKL with safetensors weights"):
        Vae.load(str(tmp_path))


def test_pickled_weights_are_refused(vae_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(vae_folder, tmp_path / "pickled"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        Vae.load(str(folder))


def test_without_diffusers_the_extra_is_named(vae_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what an absent package looks like to import
    with pytest.raises(UserError, match=r"pip install 'fasttrain\[latents\]'"):
        Vae.load(str(vae_folder))
