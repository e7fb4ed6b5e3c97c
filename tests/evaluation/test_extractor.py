"""An extractor trained on real digits, and its file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fasttrain.cli import main
from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError
from fasttrain.evaluation.classifier import Classifier, stage_widths
from fasttrain.evaluation.extractor import Extractor, ExtractorFile
from fasttrain.evaluation.extractor_training import train_extractor
from fasttrain.files import digest
from tests.shards import write_random

STEPS = 60


@pytest.fixture(scope="module")
def file(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("extractor") / "digits.safetensors"
    assert main(["evaluate", "train-extractor", str(digits), "--out", str(path), "--steps", str(STEPS), "--seed", "3"]) == 0
    return path


def images_of(digits: Path, count: int = 50) -> tuple[np.ndarray, np.ndarray]:
    found = ShardSet.open(digits).gather(np.arange(count))
    return found.arrays.transpose(0, 2, 3, 1), found.labels


def test_its_file_says_how_it_was_made_and_how_well_it_does(file: Path, digits: Path):
    told = ExtractorFile(str(file)).open(torch.device("cpu")).told
    assert (told["name"], told["xxh3"], told["set_xxh3"]) == ("extractor", digest(file), ShardSet.open(digits).index.xxh3)
    assert (told["channels"], told["size"], told["seed"], told["steps"]) == (1, 8, 3, STEPS)
    assert (told["held_out"], told["trained"]) == (359, 1438) and list(told["classes"]) == [str(i) for i in range(10)]
    assert 0.7 < told["accuracy"] <= 1 and json.loads(json.dumps(told)) == told
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_its_accuracy_is_that_on_images_it_never_saw(file: Path, digits: Path):
    loaded, shards = Extractor.load(file), ShardSet.open(digits)
    unseen = np.random.default_rng(3).permutation(len(shards))[: loaded.record.held_out]
    found = shards.gather(unseen)
    right = loaded.classify(found.arrays.transpose(0, 2, 3, 1)) == found.labels
    assert right.mean() == loaded.record.accuracy


def test_features_of_an_image_do_not_depend_on_the_others(file: Path, digits: Path):
    extractor, (images, _) = Extractor.load(file), images_of(digits, 300)
    features = extractor(images)
    assert features.shape == (300, 64) and features.dtype == np.float64
    assert np.allclose(features[7:8], extractor(images[7:8]), rtol=1e-4, atol=1e-5)
    assert np.abs(features - features.mean(0)).max() > 0.1


def test_the_seed_decides_it(digits: Path):
    shards = ShardSet.open(digits)
    one, again, other = (train_extractor(shards, "digits", steps=2, seed=seed) for seed in (0, 0, 1))
    weights = [torch.cat([p.flatten() for p in trained.network.parameters()]) for trained in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 3), (13, 1), (32, 3), (64, 3)])
def test_networks_fit_images_of_every_size(size: int, channels: int):
    network = Classifier(channels, size, 5)
    x = torch.zeros(2, channels, size, size)
    assert network(x).shape == (2, 5) and network.features(x).shape == (2, stage_widths(size)[-1])
    assert (stage_widths(4), stage_widths(8), stage_widths(64)) == ([32], [32, 64], [32, 64, 128, 128, 128])


def test_images_of_another_shape_are_refused(file: Path):
    with pytest.raises(UserError, match=r"trained on images of \(8, 8, 1\), these are \(16, 16, 3\)"):
        Extractor.load(file)(np.zeros((2, 16, 16, 3), np.uint8))


@pytest.mark.parametrize(
    ("damage", "told"), [("cut", "no extractor"), ("other", "no extractor"), ("format", "format 2"), ("nan", "not finite")]
)
def test_another_file_is_refused(file: Path, tmp_path: Path, damage: str, told: str):
    path = tmp_path / "file.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())
    if damage == "other":
        metadata = {"format": "pt"}
    elif damage == "format":
        metadata["fasttrain_extractor"] = json.dumps({**json.loads(metadata["fasttrain_extractor"]), "format": 2})
    elif damage == "nan":
        tensors["decide.bias"] *= torch.nan
    save_file(tensors, path, metadata)
    if damage == "cut":
        path.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=told):
        Extractor.load(path)


@pytest.mark.parametrize(
    ("kind", "shape", "classes", "told"),
    [
        ("image", (1, 8, 8), 2, "and 6 images: an extractor needs two classes and ten images"),
        ("image", (1, 8, 8), 1, "has 1 classes"),
        ("latent", (2, 2, 4, 8, 8), 2, "holds latents"),
    ],
)
def test_a_set_that_cannot_be_learned_is_refused(tmp_path: Path, capsys, kind: str, shape: tuple[int, ...], classes: int, told: str):
    shards = write_random(tmp_path / "set", kind, shape, classes)
    assert main(["evaluate", "train-extractor", str(shards), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()
