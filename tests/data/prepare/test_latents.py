"""Preparing latents: both views, both moments, a scale that normalises, and bytes that do not know the number of processes."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from fasttrain.data.order import permutation
from fasttrain.data.prepare import latents
from fasttrain.data.prepare.images import prepare_images
from fasttrain.data.prepare.latents import prepare_latents
from fasttrain.data.shards import ShardSet
from fasttrain.data.transform import build_transform
from fasttrain.data.vae import Vae
from fasttrain.errors import UserError

from ..conftest import contents

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Another number of threads may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prepared(image_tree: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "set"
    torch.set_num_threads(1)
    prepare_latents(image_tree, out, Vae.load(str(vae_folder)), size=16, batch=8, shard_size=40)
    return out


def test_both_views_are_the_encodings_of_the_image_and_its_mirror(image_tree: Path, vae_folder: Path, prepared: Path, tmp_path: Path):
    prepare_images(image_tree, tmp_path / "pixels", size=16, shard_size=40)
    pixels, labels, _ = ShardSet.open(tmp_path / "pixels").gather(np.arange(203))
    stored, latent_labels, _ = ShardSet.open(prepared).gather(np.arange(203))
    assert stored.shape == (203, 2, 2, 4, 8, 8) and stored.dtype == np.float16
    np.testing.assert_array_equal(labels, latent_labels)
    vae, images = Vae.load(str(vae_folder)), torch.from_numpy(pixels).float() / 127.5 - 1
    for view, seen in enumerate([images, images.flip(-1)]):
        expected = vae.encode(seen).numpy()
        # fp16 keeps 11 bits; the batch's size moves an fp32 latent by about 1e-6.
        np.testing.assert_allclose(stored[:, view], expected, rtol=2**-11, atol=1e-5)


def test_the_index_names_the_autoencoder(vae_folder: Path, prepared: Path):
    index = ShardSet.open(prepared).index
    assert index.vae == Vae.load(str(vae_folder)).record
    assert index.kind == "latent" and index.x0_shape == (4, 8, 8) and index.rejected == 2 and index.num_classes == 3


def test_stock_webdataset_reads_the_same(prepared: Path):
    shards = ShardSet.open(prepared)
    urls = [str(prepared / shard.file) for shard in shards.index.shards]
    arrays, labels, _ = shards.gather(np.arange(203))
    for sample, array, label in zip(webdataset.WebDataset(urls, shardshuffle=False).decode(), arrays, labels, strict=True):
        np.testing.assert_array_equal(sample["npy"], array)
        assert sample["cls"] == label


def test_the_recorded_scale_normalises_sampled_latents(prepared: Path):
    """203 samples x 64 places x 2 views: shift and scale hold exactly for the set, so only the posterior's draws err, by under 2 %."""
    shards = ShardSet.open(prepared)
    stored = torch.from_numpy(shards.gather(np.arange(203))[0]).repeat(8, 1, 1, 1, 1, 1)
    transform = build_transform(shards.index, torch.tensor(3), flip=True)
    position = torch.arange(len(stored))
    x0 = transform(stored, position).sample(3, position)
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(x0.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.02)


OPTIONS = ["--size", "16", "--batch", "8", "--shard-size", "40"]
COMMAND = """
import argparse, sys, torch
from fasttrain.data.prepare import latents
torch.set_num_threads(1)
parser = argparse.ArgumentParser()
latents.add_arguments(parser)
latents.run(parser.parse_args(sys.argv[1:]))
"""


def test_two_processes_write_the_bytes_of_one(image_tree: Path, vae_folder: Path, prepared: Path, tmp_path: Path):
    out = tmp_path / "set"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", COMMAND, str(image_tree), str(out), "--vae", str(vae_folder), *OPTIONS]
    launched = {"PYTHONPATH": path, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": ""}
    other = subprocess.Popen(command, env={**os.environ, **launched})
    prepare_latents(image_tree, out, Vae.load(str(vae_folder)), size=16, batch=8, shard_size=40, threads=3, rank=0, world_size=2)
    assert other.wait(timeout=60) == 0
    assert contents(out) == contents(prepared)


def test_each_rank_makes_its_own_shards(image_tree: Path, vae_folder: Path, prepared: Path, tmp_path: Path):
    out = tmp_path / "set"
    assert prepare_latents(image_tree, out, Vae.load(str(vae_folder)), size=16, batch=8, shard_size=40, rank=1, world_size=2) is None
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-00001.tar", "shard-00003.tar", "shard-00005.tar"]
    whole = prepare_latents(image_tree, out, Vae.load(str(vae_folder)), size=16, batch=8, shard_size=40)
    assert whole is not None and whole.made == 205 - sum(205 * (n + 1) // 6 - 205 * n // 6 for n in (1, 3, 5))
    assert contents(out) == contents(prepared)


def test_the_order_of_samples_is_that_of_the_shuffled_source(image_tree: Path, prepared: Path):
    files = sorted(path.relative_to(image_tree).as_posix() for path in image_tree.rglob("*.*"))
    shuffled = [files[i] for i in permutation(205, 0) if not files[i].endswith(("notes.txt", "void.jpg"))]
    classes = ShardSet.open(prepared).index.classes
    assert [classes[label] for label in ShardSet.open(prepared).labels] == [name.partition("/")[0] for name in shuffled]


@pytest.mark.parametrize(("changes", "told"), [({"batch": 4}, "batch 8 there, 4"), ({"dtype": "float32"}, "dtype 'float16' there")])
def test_other_settings_in_the_same_folder(image_tree: Path, vae_folder: Path, prepared: Path, changes: dict, told: str):
    with pytest.raises(UserError, match=f"already holds a different set .*{told}"):
        prepare_latents(image_tree, prepared, Vae.load(str(vae_folder)), **{"size": 16, "batch": 8, "shard_size": 40, **changes})


def test_a_size_that_the_autoencoder_does_not_divide(image_tree: Path, vae_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"--size 17: must be a multiple of 2"):
        prepare_latents(image_tree, tmp_path / "out", Vae.load(str(vae_folder)), size=17)


def test_latents_that_are_not_finite_are_refused(image_tree: Path, vae_folder: Path, tmp_path: Path):
    vae = Vae.load(str(vae_folder))
    vae.model.quant_conv.bias.data[0] = 1e6  # beyond fp16
    with pytest.raises(UserError, match=r"not finite in float16; try --dtype float32"), np.errstate(over="ignore", invalid="ignore"):
        prepare_latents(image_tree, tmp_path / "out", vae, size=16, shard_size=300)
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_command(image_tree: Path, vae_folder: Path, prepared: Path, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    latents.add_arguments(parser)
    latents.run(parser.parse_args([str(image_tree), str(prepared), "--vae", str(vae_folder), *OPTIONS]))
    assert "203 samples of 2x2x4x8x8, 3 classes, 6 shards (nothing left to do: all shards verified)" in capsys.readouterr().out
