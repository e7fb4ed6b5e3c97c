"""`fasttrain evaluate` on a real small run: in which features, against what, on how many processes."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fasttrain.cli import main
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from tests.commands import fasttrain
from tests.disks import fill
from tests.evaluation.test_torchscript import Inception, saved
from tests.http_server import FaultyServer
from tests.ranks import free_port, run_ranks
from tests.runs import plain_config

FAST = ("--steps", "3", "--batch", "16", "--count", "64")
CLASSES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of two steps and an extractor of digits."""
    folder = tmp_path_factory.mktemp("scores")
    (folder / "run.yaml").write_text(yaml.safe_dump(plain_config(folder / "run", digits, training={"steps": 2})))
    done = fasttrain("train", folder / "run.yaml")
    assert done.status == 0, done.err
    assert main(["evaluate", "train-extractor", str(digits), "--out", str(folder / "x.safetensors"), "--steps", "20"]) == 0
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


def scored(made: Path, reference: Path | str, *more: str) -> dict[str, Any]:
    """The scores of a call, by features."""
    out = Path(os.environ["FASTTRAIN_CACHE"]).parent / "out"
    assert main(["evaluate", str(made / "run"), "--reference", str(reference), *FAST, "--out", str(out), *more]) == 0
    return {path.stem.rpartition("-")[2]: json.loads(path.read_text()) for path in out.iterdir()}


def test_one_call_scores_the_same_samples_in_all_features(made, digits, cache, capsys):
    extractor, inception = made / "x.safetensors", saved(Inception(), cache.parent.parent / "f.pt")
    found = scored(made, digits, "--features", "pixels", f"extractor={extractor}", f"torchscript={inception}")
    assert sorted(found) == ["extractor", "pixels", "torchscript"]
    for score in found.values():
        assert score["frechet_distance"] > 0 and 0 <= score["precision"] <= 1 and 0 <= score["recall"] <= 1
        assert score["neighbours"] == {"k": 3, "samples": 64, "reference": 1797}
        assert (score["samples"], score["reference_samples"]) == (64, 1797) and score["protocol"]["device"]
    told = found["extractor"]["features"]
    assert len(told["xxh3"]) == 32 and 0 < told["accuracy"] <= 1 and told["classes"] == CLASSES
    agreement = found["extractor"]["agreement"]
    assert {name: count["samples"] for name, count in agreement["classes"].items()} == {n: 7 if int(n) < 4 else 6 for n in CLASSES}
    agreed = sum(count["samples"] * count["share"] for count in agreement["classes"].values())
    assert agreement["share"] == pytest.approx(agreed / 64) and found["pixels"]["agreement"] is None
    assert len(found["torchscript"]["features"]["sha256"]) == 64 and "agreement" in capsys.readouterr().out


def test_the_references_statistics_are_computed_once(made, digits, cache, monkeypatch):
    first = scored(made, digits)
    (kept,) = cache.iterdir()
    monkeypatch.setattr("fasttrain.evaluation.reference.Shards.parts", None)
    assert scored(made, digits)["pixels"]["frechet_distance"] == first["pixels"]["frechet_distance"]
    monkeypatch.undo()
    monkeypatch.setenv("FASTTRAIN_CACHE", str(cache.parent))
    kept.write_bytes(kept.read_bytes()[:-1])
    assert scored(made, digits)["pixels"]["frechet_distance"] == first["pixels"]["frechet_distance"]


def test_statistics_that_cannot_be_kept_are_told(made, digits, cache, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    assert scored(made, digits)["pixels"]["frechet_distance"] > 0
    assert "the statistics of shards are not kept" in capsys.readouterr().out


def test_statistics_of_others_give_the_distance_that_their_images_give(made, digits, tmp_path):
    """ADM's reference batches: mu and sigma, and images for precision and recall."""
    of_images = scored(made, digits)["pixels"]
    pixels = np.concatenate([np.load(path)["a"] for path in _pixels(digits, tmp_path)])
    vectors = pixels.reshape(len(pixels), -1) / 255.0
    statistics = {"mu": vectors.mean(0), "sigma": np.cov(vectors.T)}
    np.savez(tmp_path / "whole.npz", arr_0=pixels, **statistics)
    np.savez(tmp_path / "alone.npz", **statistics)
    whole, alone = (scored(made, tmp_path / name)["pixels"] for name in ("whole.npz", "alone.npz"))
    for found in (whole, alone):
        assert found["frechet_distance"] == pytest.approx(of_images["frechet_distance"], rel=1e-9)
        assert found["reference_samples"] is None and found["protocol"]["reference_kind"] == "statistics"
    assert (whole["precision"], whole["recall"]) == (of_images["precision"], of_images["recall"])
    assert alone["precision"] is alone["recall"] is alone["neighbours"] is None


def _pixels(digits: Path, folder: Path) -> list[Path]:
    from fasttrain.data.shards import ShardSet

    shards = ShardSet.open(digits)
    np.savez(folder / "pixels.npz", a=shards.gather(np.arange(len(shards))).arrays.transpose(0, 2, 3, 1))
    return [folder / "pixels.npz"]


def _evaluate(processes: Processes, arguments: list[str], port: int, cache: str) -> int:
    """The command on this rank, in a group of its own. Its surroundings are those of the server that forked it, so they are set here."""
    distributed.finish()
    os.environ.update(MASTER_PORT=str(port), FASTTRAIN_CACHE=cache)
    return main(arguments)


def test_two_processes_find_the_score_of_one(made, digits, tmp_path):
    """Over images that are the same: 64 samples are two full batches of 16 for each of two processes, and four for one."""
    features = ["--features", "pixels", f"extractor={made / 'x.safetensors'}"]
    command = ["evaluate", str(made / "run"), "--reference", str(digits), *FAST, *features]
    scores = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        cache = tmp_path / f"cache-{ranks}"
        assert run_ranks(ranks, _evaluate, [*command, "--out", str(out)], free_port(), str(cache)) == [0] * ranks
        assert len(list((cache / "statistics").iterdir())) == 2, "computed by these ranks, not found"
        scores.append({path.name: json.loads(path.read_text()) for path in sorted(out.iterdir())})
    one, two = scores
    assert sorted(one) == sorted(two) and len(one) == 2
    for name in one:
        assert two[name]["frechet_distance"] == pytest.approx(one[name]["frechet_distance"], rel=1e-6)
        same = ("precision", "recall", "neighbours", "agreement", "samples", "reference_samples", "features", "protocol")
        assert {key: two[name][key] for key in same} == {key: one[name][key] for key in same}


def held(folder: Path) -> list[str]:
    """The files of a cache that somebody has not let go of."""
    found = []
    for path in folder.iterdir():
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path.name)
    return found


def test_sets_in_a_store_are_let_go_of_also_after_a_mistake(made, digits, cache, tmp_path):
    with FaultyServer(digits) as server:
        train = ["evaluate", "train-extractor", server.url, "--out", str(tmp_path / "x.safetensors"), "--steps", "1"]
        score = ["evaluate", str(made / "run"), "--reference", server.url, *FAST, "--out", str(tmp_path / "out")]
        for command, status in ((train, 0), (score, 0), ([*score, "--size", "5"], 2)):
            assert main(command) == status
            assert any((cache.parent / "files").glob("*.tar")) and held(cache.parent / "files") == [], command[1]


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (["pixel"], "unknown features 'pixel'; did you mean 'pixels'?"),
        (["extractor"], "--features 'extractor': features 'extractor': file: "),
        (["extractor=nowhere.safetensors"], "nowhere.safetensors: no extractor of `fasttrain evaluate train-extractor`"),
        (["torchscript=nowhere.pt"], "nowhere.pt: not a TorchScript file"),
        (["pixels=x"], "features 'pixels' has no parameter 'file'"),
        (["pixels", "pixels"], "pixels is given twice"),
    ],
)
def test_features_that_cannot_be_are_named(made, digits, capsys, features, told):
    assert main(["evaluate", str(made / "run"), "--reference", str(digits), *FAST, "--features", *features]) == 2
    assert told in capsys.readouterr().err and not (made / "run" / "scores").exists()


def test_statistics_of_other_features_are_refused_before_sampling(made, tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setattr("fasttrain.commands.evaluate._collected", None)
    command = ["evaluate", str(made / "run"), "--reference", str(tmp_path / "s.npz"), *FAST]
    assert main(command) == 2 and "pixels features have 64 numbers, its statistics 2048" in capsys.readouterr().err
    assert main([*command, "--size", "8"]) == 2 and "--size 8: " in capsys.readouterr().err


def test_an_extractor_of_other_classes_counts_no_agreement(made, digits, tmp_path, capsys):
    from fasttrain.evaluation.extractor import Extractor

    one = Extractor.load(made / "x.safetensors")
    renamed = one.record.model_copy(update={"classes": tuple("abcdefghij")})
    Extractor(one.network, renamed).save(tmp_path / "y.safetensors")
    found = scored(made, digits, "--features", f"extractor={tmp_path / 'y.safetensors'}")["extractor"]
    assert found["agreement"] is None and found["features"]["classes"] == list("abcdefghij")
    assert "agreement is not counted: the extractor tells 10 classes of shards apart, and they are not those" in capsys.readouterr().out


def test_a_model_of_more_classes_than_its_set_counts_no_agreement(made, digits, tmp_path, capsys):
    config = plain_config(tmp_path / "run", digits, training={"steps": 1})
    config["model"]["num_classes"] = 12
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert fasttrain("train", tmp_path / "run.yaml").status == 0
    (tmp_path / "x.safetensors").write_bytes((made / "x.safetensors").read_bytes())
    found = scored(tmp_path, digits, "--features", f"extractor={tmp_path / 'x.safetensors'}")["extractor"]
    assert found["agreement"] is None and found["frechet_distance"] > 0
    told = "agreement is not counted: the extractor tells 10 classes of shards apart, and the model is told 12"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--checkpoint-steps", "x"], "--checkpoint-steps 'x': give steps as numbers"),
        (
            ["--checkpoint-steps", "1", "--weights", "untrained"],
            "--weights untrained is the network before its first step, of no checkpoint",
        ),
        (["--checkpoint-steps", "all", "--weights", "untrained"], "--weights untrained is the network before its first step"),
        (["--out", "score.json"], "--out score.json: it names a folder for the scores"),
    ],
)
def test_what_cannot_be_is_refused_before_processes_meet(made, digits, capsys, monkeypatch, more, told):
    monkeypatch.setattr(distributed, "joined", None)
    assert main(["evaluate", str(made / "run"), "--reference", str(digits), *FAST, *more]) == 2
    assert told in capsys.readouterr().err and not Path("score.json").exists()


def test_an_extractor_is_asked_for_sensibly(digits, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    assert main(["evaluate", "train-extractor", str(digits), "--out", str(out), "--steps", "0"]) == 2
    assert "give at least one step" in capsys.readouterr().err and not out.exists()
    assert main(["evaluate", "train-extractor", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "no such folder of shards" in capsys.readouterr().err
    assert main(["evaluate", "train-extractor", str(digits), "--out", str(tmp_path)]) == 2
    assert "is a folder; give the name of a file" in capsys.readouterr().err


def test_an_extractor_on_a_full_disk_is_told_before_training_and_after_it(digits, disk, capsys, monkeypatch):
    folder = disk(1 << 20)
    ballast = fill(folder, leave=0)
    command = ["evaluate", "train-extractor", str(digits), "--out", str(folder / "x.safetensors"), "--steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("fasttrain.commands.train_extractor.train_extractor", None)
        assert main(command) == 2 and "No space left on device; make room or choose another file" in capsys.readouterr().err
    ballast.unlink()
    fill(folder, leave=1 << 14)  # enough for what is tried, and not for the extractor
    assert main(command) == 2 and "cannot write there: No space left on device" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["ballast"]
