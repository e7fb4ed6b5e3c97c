"""The commands on a real small run: what they write, and that it is the same however many processes write it."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from fasttrain.cli import main
from fasttrain.cond import Cond
from fasttrain.models import MODELS
from fasttrain.sampling.generate import Generator
from fasttrain.trained import Trained
from fasttrain.versions import installed
from tests.commands import fasttrain
from tests.labelled_images import write_set
from tests.living import command, living
from tests.runs import plain_config

STEPS = 200
FAST = ("--steps", "6", "--batch", "16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of a very small ViT, trained until its samples begin to look like digits."""
    folder = tmp_path_factory.mktemp("commands")
    config = plain_config(
        folder / "run",
        digits,
        data={"held_out": 64},
        optimizer={"learning_rate": 2e-3, "ema": [{"half_life": 1000}, {"half_life": 20}]},
        training={"steps": STEPS, "global_batch": 64},
        sampling={"every": STEPS // 2, "count": 9, "sampler": {"name": "heun", "steps": 6}},
        log={"every": 50, "held_out_every": STEPS // 2, "tensorboard": True},
        checkpoint={"every": 80, "keep_last": 1, "keep_every": 80},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = fasttrain("train", folder / "run.yaml")
    assert done.status == 0, done.err
    return folder / "run"


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_leaves_what_it_promises(run):
    for name in (
        "config.yaml",
        "environment.json",
        "data.json",
        "checkpoints/latest",
        "samples/step-00000100.png",
        "samples/step-00000200.png",
        "tensorboard",
    ):
        assert (run / name).exists(), name
    reports = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in reports] == [50, 100, 150, 200]
    assert reports[-1]["loss"] < 0.7 * reports[0]["loss"] and reports[-1]["position"] == STEPS * 64
    held_out = [record for record in records(run) if "held_out_loss" in record]
    assert [record["step"] for record in held_out] == [100, 200] and held_out[1]["held_out_loss"] < held_out[0]["held_out_loss"]


def test_a_finished_run_started_again_trains_nothing(run):
    before = records(run)
    done = fasttrain("train", run.parent / "run.yaml")
    assert done.status == 0 and "continuing from step-00000200" in done.out and records(run) == before


def test_sample_writes_pictures_a_grid_and_an_array(run, tmp_path, capsys):
    assert main(["sample", str(run), "--out", str(tmp_path), "--count", "23", *FAST]) == 0
    assert str(tmp_path / "grid.png") in capsys.readouterr().out
    batch = np.load(tmp_path / "samples.npz")
    assert batch["arr_0"].shape == (23, 8, 8, 1) and batch["arr_0"].dtype == np.uint8
    assert batch["labels"].tolist() == [i % 10 for i in range(23)]
    assert sorted(path.name for path in tmp_path.glob("0*.png")) == [f"{i:06d}.png" for i in range(23)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "000022.png")), batch["arr_0"][22, :, :, 0])
    assert len(np.unique(batch["arr_0"].reshape(23, -1), axis=0)) == 23
    assert Image.open(tmp_path / "grid.png").size[0] > 4 * 64
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_holds_the_last_call_s_samples_alone(run, tmp_path):
    out = tmp_path / "out"
    assert main(["sample", str(run), "--out", str(out), "--count", "12", *FAST]) == 0
    for name in ("captions.txt", "mine.png", "12.png"):
        (out / name).touch()
    assert main(["sample", str(run), "--out", str(out), "--count", "5", *FAST]) == 0
    kept = {"grid.png", "samples.npz", "mine.png", "12.png", *(f"{i:06d}.png" for i in range(5))}
    assert {path.name for path in out.iterdir()} == kept


def test_samples_of_a_step_have_a_folder_of_their_own(run, capsys):
    for step in (80, 160):
        assert main(["sample", str(run), "--checkpoint-step", str(step), "--count", "2", *FAST]) == 0
        assert np.load(run / "samples" / f"ema-step-{step}" / "samples.npz")["arr_0"].shape == (2, 8, 8, 1)
    assert main(["sample", str(run), "--checkpoint-step", "80", "--weights", "untrained", "--count", "2", *FAST]) == 2
    told = "--weights untrained is the network before its first step, of no checkpoint: "
    assert f"{told}leave it out, or --checkpoint-step\n" in capsys.readouterr().err
    assert main(["export", str(run), str(run / "untrained.safetensors"), "--weights", "untrained"]) == 2
    assert f"{told}there is nothing to export" in capsys.readouterr().err and not (run / "untrained.safetensors").exists()


def test_labels_and_seed_decide_the_samples(run, tmp_path):
    drawn = {}
    for name, more in {
        "a": [],
        "again": [],
        "labels": ["--labels", "3", "7"],
        "seed": ["--seed", "1"],
        "guided": ["--guidance", "3"],
        "guided at times": ["--guidance", "3", "--guidance-interval", "0.2", "0.6"],
        "guided more": ["--guidance", "2", "--guidance-resolution", "2"],
        "euler": ["--sampler", "euler"],
        "rho": ["--sampler", "heun", "rho=3"],
    }.items():
        assert main(["sample", str(run), "--out", str(tmp_path / name), "--count", "8", *FAST, *more]) == 0
        drawn[name] = dict(np.load(tmp_path / name / "samples.npz"))
    assert np.array_equal(drawn["a"]["arr_0"], drawn["again"]["arr_0"])
    assert drawn["labels"]["labels"].tolist() == [3, 7] * 4
    assert np.array_equal(drawn["guided"]["arr_0"], drawn["guided more"]["arr_0"])
    for name in ("labels", "seed", "guided", "euler", "rho"):
        assert not np.array_equal(drawn["a"]["arr_0"], drawn[name]["arr_0"]), name
    assert not np.array_equal(drawn["guided"]["arr_0"], drawn["guided at times"]["arr_0"])


def test_two_processes_draw_the_samples_of_one(run, tmp_path):
    """Equal to the rounding of the network at another batch: none of the bytes differs by more than one."""
    arguments = ("sample", str(run), "--count", "21", "--steps", "6", "--batch", "8", "--guidance", "1.5")
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    with living(2, tmp_path, command, *arguments, "--out", str(tmp_path / "two")) as ranks:
        assert [ranks.status(rank) for rank in range(2)] == [0, 0], ranks.output(0) + ranks.output(1)
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert np.array_equal(one["labels"], two["labels"])
    difference = np.abs(one["arr_0"].astype(int) - two["arr_0"].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())


def test_evaluate_scores_training_and_keeps_the_protocol(run, digits, tmp_path, capsys):
    command = ["evaluate", str(run), "--reference", str(digits), "--count", "300", "--steps", "6", "--out", str(tmp_path)]
    assert main([*command, "--weights", "untrained", "raw", "ema"]) == 0
    told, scores = capsys.readouterr().out, {}
    assert told.count("heun with 6 steps: its own error may outweigh the network's; take 18, or --sampler dpm_solver\n") == 1
    for weights, step in (("untrained", 0), ("raw", STEPS), ("ema", STEPS)):
        scores[weights] = json.loads((tmp_path / f"step-{step:08d}-{weights}-pixels.json").read_text())
        assert f"Frechet distance {scores[weights]['frechet_distance']:.4f}" in told
    assert scores["untrained"]["frechet_distance"] > 2 * scores["ema"]["frechet_distance"] > 0
    score, protocol = scores["ema"], scores["ema"]["protocol"]
    assert (score["samples"], score["reference_samples"], score["features"]) == (300, 1797, {"name": "pixels", "version": 1})
    assert protocol["weights"] == "ema of 1000 images" and protocol["checkpoint_step"] == STEPS and protocol["guidance"] == 1.0
    assert (
        protocol["sampler"] == {"name": "heun", "steps": 6, "sigma_max": 80.0, "rho": 7.0}
        and protocol["seed"] == 0
        and len(protocol["reference_digest"]) == 32
    )
    assert scores["untrained"]["protocol"]["checkpoint_step"] == 0 and protocol["versions"]["torch"] == installed("torch")


def test_evaluate_keeps_a_score_for_each_checkpoint_in_the_run(run, digits, capsys):
    command = ["evaluate", str(run), "--reference", str(digits), "--count", "20", *FAST]
    assert main([*command, "--weights", "ema_1", "untrained", "--checkpoint-steps", "all"]) == 0
    kept = {path.name: json.loads(path.read_text())["protocol"] for path in (run / "scores").iterdir()}
    assert {name: (protocol["weights"], protocol["checkpoint_step"]) for name, protocol in kept.items()} == {
        "step-00000000-untrained-pixels.json": ("untrained", 0),
        "step-00000080-ema_1-pixels.json": ("ema of 20 images", 80),
        "step-00000160-ema_1-pixels.json": ("ema of 20 images", 160),
        "step-00000200-ema_1-pixels.json": ("ema of 20 images", 200),
    }
    for steps, named in ((["90"], "no checkpoint of step 90; it has: 80, 160, 200"), (["all", "80"], "'all': give steps as numbers")):
        assert main([*command, "--checkpoint-steps", *steps]) == 2 and named in capsys.readouterr().err


def test_a_kept_checkpoint_gives_the_samples_of_its_own_step(run, tmp_path, capsys):
    for step in ("80", "160"):
        assert main(["sample", str(run), "--out", str(tmp_path / step), "--count", "8", *FAST, "--checkpoint-step", step]) == 0
    assert not np.array_equal(*(np.load(tmp_path / step / "samples.npz")["arr_0"] for step in ("80", "160")))
    old, newest = (Trained.load(run, "raw", torch.device("cpu"), step) for step in (80, None))
    assert (old.step, newest.step) == (80, 200)
    assert not torch.equal(*(next(trained.network.parameters()) for trained in (old, newest)))


def exported(run: Path, out: Path, weights: str) -> tuple[torch.nn.Module, dict[str, str]]:
    """The network built from an exported file alone."""
    assert main(["export", str(run), str(out), "--weights", weights]) == 0
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    network = MODELS.build(json.loads(metadata["model"])).build()
    network.load_state_dict(tensors)
    return network.eval(), metadata


def test_export_holds_a_network_that_anyone_can_build(run, tmp_path):
    x, t, cond = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 500, 998, 999]), Cond(torch.tensor([0, 3, 9, 10, 1]))
    outputs = {}
    for weights in ("raw", "ema", "ema_1"):
        network, metadata = exported(run, tmp_path / f"{weights}.safetensors", weights)
        with torch.no_grad():
            outputs[weights] = network(x, t, cond)
            assert torch.equal(outputs[weights], Trained.load(run, weights, torch.device("cpu")).network(x, t, cond))
        assert metadata["step"] == str(STEPS) and json.loads(metadata["config"])["training"]["steps"] == STEPS
    assert not torch.equal(outputs["raw"], outputs["ema"]) and not torch.equal(outputs["ema"], outputs["ema_1"])
    assert metadata["weights"] == "ema of 20 images"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema.safetensors", "ema_1.safetensors", "raw.safetensors"]


def test_a_dry_run_tells_and_writes_nothing(digits, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(plain_config(tmp_path / "run", digits)))
    assert main(["train", str(config), "--dry-run"]) == 0
    told = capsys.readouterr().out
    for words in ("1,797 samples of 1 x 8 x 8", "trained parameters", "G forward", "1 (chosen)", "x0 [16, 1, 8, 8]"):
        assert words in told, words
    assert list(tmp_path.iterdir()) == [config]


def test_a_dry_run_asks_for_what_its_sampler_needs(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what an absent package looks like to import
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(plain_config(tmp_path / "run", digits, sampling={"every": 5, "sampler": "dpm_solver"})))
    assert main(["train", str(config), "--dry-run"]) == 2
    assert "samplers ddim, dpm_solver and ddpm need diffusers" in capsys.readouterr().err


def test_a_profile_is_a_trace_of_training_steps(digits, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(plain_config(tmp_path / "run", digits, training={"steps": 6})))
    done = fasttrain("train", config, "--profile", "2")
    assert done.status == 0 and "profile written to" in done.out, done.err
    with gzip.open(tmp_path / "run" / "profile.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) >= 2 and any("aten::" in name for name in names)


def test_the_doctor_reports(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert all(item in told for item in ("torch", "triton", "deepspeed", "flash-attn", "apex", "adaln"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--weights", "exp_avg"], "run has ema, ema_1, raw, untrained"),
        (["--labels", "3", "12"], "class labels must lie in [0, 10)"),
        (["--count", "0"], "a count and a batch of at least 1"),
        (["--steps", "0"], "--sampler, --steps: sampler 'heun': steps must be at least 1 and at most 10000, got 0"),
        (["--sampler", "hein"], "unknown sampler 'hein'; did you mean 'heun'?"),
        (["--sampler", "ddim", "0.5"], "parameters read key=value"),
        (["--sampler", "ddim", "eta=2"], "eta must lie in [0, 1], got 2"),
        (["--guidance-interval", "0.8", "0.2"], "interval must be two fractions of T"),
        (["--control-guidance", "1.375"], "control guidance 1.375 needs a model with controls"),
        (["--guidance-resolution", "2"], "--guidance-resolution: it multiplies --guidance, which is 1"),
        (["--guidance-resolution", "2", "--control-guidance", "2"], "--guidance-resolution: it multiplies --guidance, which is 1"),
        (["--guidance-interval", "0.2", "0.8"], "--guidance-interval: there is no guidance to limit"),
        (["--guidance", "0", "--control-guidance", "2"], "--control-guidance: at --guidance 0"),
        (["--guidance", "0.5", "--guidance-resolution", "2", "--control-guidance", "2"], "--control-guidance: at --guidance 0.5 and"),
        (["--vae", "somewhere"], "--vae, --vae-revision: the samples of"),
        (["--vae-revision", "a" * 40], "are pixels, which none decodes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_sample_names_what_cannot_be(run, tmp_path, capsys, more, named):
    assert main(["sample", str(run), "--out", str(tmp_path / "out"), *FAST, *more]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before anything is sampled."""
    monkeypatch.setattr(Generator, "_sample", lambda *_: pytest.fail("sampled"))


@pytest.mark.usefixtures("no_samples")
def test_a_score_needs_images_of_the_samples_shape(run, tmp_path, capsys, small_images: Callable[[int], Path]):
    command = ["evaluate", str(run), "--reference", str(small_images(16)), "--count", "10", *FAST, "--out", str(tmp_path / "s")]
    assert main(command) == 2
    assert "samples are images (8, 8, 1), the reference holds (16, 16, 3)" in capsys.readouterr().err
    assert main([*command, "--size", "8"]) == 2
    assert "--size 8:" in (told := capsys.readouterr().err) and "was prepared at 16 and is compared as it is" in told
    assert main([*command, "--size", "16"]) == 2 and "samples are images (8, 8, 1)" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("no_samples")
def test_a_reference_made_elsewhere_is_read_at_the_size_that_is_asked_for(run: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    command = ["evaluate", str(run), "--reference", str(write_set(tmp_path / "set", [20])), "--count", "10", *FAST]
    assert main(command) == 2 and "--size" in capsys.readouterr().err
    assert main([*command, "--size", "8"]) == 2
    assert "samples are images (8, 8, 1), the reference holds (8, 8, 3)" in capsys.readouterr().err


@pytest.fixture
def small_images(tmp_path: Path) -> Callable[[int], Path]:
    """Shards of a few colour images of this size."""

    def make(size: int) -> Path:
        for name in ("a", "b"):
            folder = tmp_path / "tree" / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{number}.png")
        assert main(["prepare", "images", str(tmp_path / "tree"), str(tmp_path / "shards"), "--size", str(size), "--workers", "1"]) == 0
        return tmp_path / "shards"

    return make
