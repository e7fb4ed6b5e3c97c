"""Which autoencoder shows a run's latents: it is the one that is named, at its own revision, and a score says which it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fasttrain.cli import main
from fasttrain.data.config import DataConfig
from fasttrain.data.index import read_index
from fasttrain.data.pretrained import folder_digest
from fasttrain.data.vae import Vae
from fasttrain.errors import UserError
from fasttrain.visible import decoder
from tests.commands import fasttrain
from tests.data.conftest import vae_folder  # noqa: F401 (fixture)
from tests.runs import plain_config
from tests.shards import write_random

OWN, COMMIT = "owner/vae", "a" * 40
FAST = ("--count", "4", "--sampler", "euler", "--steps", "2", "--weights", "raw")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of latents [4, 8, 8] that OWN made, at the commit of forty zeros."""
    folder = tmp_path_factory.mktemp("latents")
    set_ = write_random(folder / "set", "latent", (2, 2, 4, 8, 8), classes=3, vae=OWN)
    config = plain_config(folder / "run", set_, training={"steps": 1, "global_batch": 2})
    config["model"] = {"name": "vit", "depth": 1, "width": 32, "heads": 2, "patch": 4, "num_timesteps": 1000}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = fasttrain("train", folder / "run.yaml")
    assert done.status == 0, done.err
    return folder / "run"


def test_a_score_names_the_vae_that_decoded(run: Path, vae_folder: Path, tmp_path: Path):  # noqa: F811
    images = write_random(tmp_path / "images", "image", (3, 16, 16), classes=3)
    command = ["evaluate", str(run), "--reference", str(images), "--vae", str(vae_folder), *FAST, "--out", str(tmp_path / "scores")]
    assert main(command) == 0
    (score,) = (tmp_path / "scores").iterdir()
    assert json.loads(score.read_text())["protocol"]["vae"] == {"id": vae_folder.name, "xxh3": folder_digest(vae_folder)}
    assert main(["sample", str(run), "--vae", str(vae_folder), *FAST, "--out", str(tmp_path / "out")]) == 0
    stored = np.load(tmp_path / "out" / "samples.npz")
    assert stored["arr_0"].shape == (4, 16, 16, 3) and stored["labels"].tolist() == [0, 1, 2, 0]


def test_a_reference_of_another_size_is_told_before_sampling(
    run: Path,
    vae_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(Vae, "decode", lambda *_: pytest.fail("sampled"))
    images = write_random(tmp_path / "images", "image", (3, 8, 8), classes=3)
    assert main(["evaluate", str(run), "--reference", str(images), "--vae", str(vae_folder), *FAST]) == 2
    assert "samples are images (16, 16, 3), the reference holds (8, 8, 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "loaded"),
    [
        (["--vae", OWN], (OWN, "0" * 40)),
        (["--vae", OWN, "--vae-revision", COMMIT], (OWN, COMMIT)),
        (["--vae", "owner/other", "--vae-revision", COMMIT], ("owner/other", COMMIT)),
    ],
)
def test_the_revision_that_is_loaded(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    loaded: tuple[str, str],
):
    def load(name: str, revision: str | None, device: torch.device) -> Vae:
        raise UserError(f"would load {(name, revision)}")

    monkeypatch.setattr(Vae, "load", load)
    assert main(["sample", str(run), *FAST, *given, "--out", str(tmp_path / "out")]) == 2
    assert f"would load {loaded}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], "give --vae, the hub id or folder of 'owner/vae'"),
        (["--vae", "owner/other"], "--vae owner/other: no such folder here; as a hub id it needs --vae-revision"),
        (["--vae", "owner/other", "--vae-revision", "main"], "with the commit's 40 hexadecimal digits (got 'main')"),
        (["--vae-revision", COMMIT], "--vae-revision: give --vae too"),
        (["--vae", "FOLDER", "--vae-revision", COMMIT], "is a folder, which has none: leave it out"),
    ],
)
def test_what_names_no_vae(
    run: Path,
    vae_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    named: str,
):
    places = [str(vae_folder) if word == "FOLDER" else word for word in given]
    assert main(["sample", str(run), *FAST, *places, "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_vae_of_other_latents_is_refused(vae_folder: Path, tmp_path: Path):  # noqa: F811
    place = write_random(tmp_path / "set", "latent", (2, 2, 8, 4, 4), classes=3)
    with pytest.raises(
        UserError, match="decodes latents of 4 channels, and these samples have 8: give that of 'stabilityai/sd-vae-ft-mse'"
    ):
        decoder(read_index(place), DataConfig(train=str(place), vae=str(vae_folder)), torch.device("cpu"))
