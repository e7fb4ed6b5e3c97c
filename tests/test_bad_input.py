"""Each mistake a user can make: one message that names the key or file and the remedy, status 2, no traceback, nothing half-written.

Every command here is a whole one in a process of its own. A full disk is a real one: a file system of a few megabytes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fasttrain.checkpoint import Manifest, newest_sound, read_weights
from tests.commands import Done, fasttrain
from tests.disks import fill
from tests.ranks import free_port
from tests.runs import plain_config
from tests.shards import write_random

ROOT = Path(__file__).resolve().parents[1]


def write_config(folder: Path, shards: Path, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(plain_config(folder / "run", shards, **sections)))
    return path


def assert_one_message(done: Done, *named: str) -> None:
    assert done.status == 2, done
    assert "Traceback" not in done.err + done.out
    lines = done.err.strip().splitlines()
    assert lines[0].startswith("fasttrain: "), done.err
    assert all(line.startswith("  ") for line in lines[1:]), f"one message, its details indented:\n{done.err}"
    for words in named:
        assert words in done.err, f"{words!r} not in: {done.err}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which says who was there last."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"training": {"stepps": 3}}, ["training.stepps: unknown key; did you mean 'steps'?"]),
        ({"diffusion": {"weighting": "min_srn"}}, ["diffusion.weighting: unknown weighting 'min_srn'; did you mean 'min_snr'?"]),
        ({"model": {"name": "vit-huge"}}, ["model: unknown model 'vit-huge'", "the choices are:", "vit-b/2"]),
        (
            {"diffusion": {"prediction": "eps", "schedule": {"name": "linear", "zero_terminal": True}}},
            ["prediction 'eps' is undefined under schedule 'linear'", "set prediction to v or x0"],
        ),
        ({"log": {"held_out_every": 5}}, ["log.held_out_every needs data.held_out"]),
        ({"training": {"global_batch": 16, "micro_batch": 5}}, ["training.global_batch 16 is not divisible by training.micro_batch 5"]),
        ({"data": {"held_out": 1797}}, ["data.held_out: 1797 of the 1797 samples", "leave some"]),
        ({"model": {"num_classes": 7}}, ["model.num_classes 7 is too small", "10 classes"]),
        ({"model": {"channels": 3}}, ["model.channels 3", "1 x 8 x 8", "prepare the data at that size"]),
        ({"data": {"vae": "owner/vae"}}, ["data.vae is 'owner/vae'", "holds images, not latents"]),
        ({"model": {"num_timesteps": 10}}, ["model.num_timesteps 10", "1000"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else ".".join(str(part) for part in [*value, *next(iter(value.values()))]),
)
def test_configs_that_cannot_be(tmp_path, digits, sections, named):
    config = write_config(tmp_path, digits, **sections)
    assert_one_message(fasttrain("train", config), *named)
    assert list(tmp_path.iterdir()) == [config], "nothing was begun"
    assert_one_message(fasttrain("train", config, "--dry-run"), *named)


def test_a_batch_that_the_processes_do_not_divide(tmp_path, digits):
    """Through the launcher: three processes, one message, the launcher's status not 0."""
    config = write_config(tmp_path, digits)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "3",
        "--master_port",
        str(free_port()),
        "-m",
        "fasttrain",
    ]
    done = subprocess.run(
        [*launcher, "train", str(config)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("fasttrain: training.global_batch 16 is not divisible by 3 processes; choose a multiple of 3") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stored", "sections", "named"),
    [
        (
            ("latent", (2, 2, 4, 8, 8), 3),
            {"data": {"vae": "owner/mine"}},
            ["data.vae is 'owner/mine'", "made with 'owner/theirs'", "name that one"],
        ),
        (("latent", (2, 2, 4, 8, 8), 3), {"model": {"channels": 16}}, ["model.channels 16", "4 x 8 x 8", "leave both out"]),
        (("image", (3, 16, 16), 3), {"model": {"input_size": 32}}, ["model.input_size 32", "3 x 16 x 16", "leave both out"]),
        (("image", (3, 15, 15), 3), {}, ["model.input_size 15 is not divisible by model.patch 2"]),
        (("image", (3, 16, 8), 3), {}, ["16 x 8 samples", "prepare it with --size"]),
        (
            ("image", (3, 16, 16), 20),
            {"model": {"num_classes": 19}},
            ["model.num_classes 19 is too small", "20 classes", "leave it out or raise it"],
        ),
    ],
    ids=["vae", "channels", "size", "patch", "square", "classes"],
)
def test_shards_of_another_kind_than_the_models(tmp_path, stored, sections, named):
    shards = write_random(tmp_path / "shards", *stored, vae="owner/theirs")
    assert_one_message(fasttrain("train", write_config(tmp_path, shards, **sections)), str(shards), *named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: shutil.rmtree(folder), ["no such folder of shards", "fasttrain prepare"]),
        (lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()], ["index.json: missing", "fasttrain prepare"]),
        (
            lambda folder: (folder / "shard-00001.tar").unlink(),
            ["shard-00001.tar: 599 of 599 (missing)", "data.max_damaged 0.01", "fasttrain prepare"],
        ),
        (
            lambda folder: os.truncate(folder / "shard-00001.tar", 70_000),
            ["shard-00001.tar: 565 of 599", "cut short: 70000 of", "fasttrain prepare"],
        ),
        (
            lambda folder: _flip_a_bit(folder / "labels.npy"),
            ["labels.npy: its content is not what was prepared", "fasttrain prepare"],
        ),
        (lambda folder: (folder / "index.json").write_text("{"), ["index.json", "prepare the set again"]),
    ],
    ids=["missing-folder", "empty-folder", "missing-shard", "truncated", "flipped-bit", "damaged-index"],
)
def test_shards_that_are_not_whole(tmp_path, digits, damage, named):
    shards = Path(shutil.copytree(digits, tmp_path / "shards"))
    damage(shards)
    assert_one_message(fasttrain("train", write_config(tmp_path / "run", shards)), str(shards), *named)
    assert not list(tmp_path.glob("run/run/checkpoints/*"))


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def test_damaged_shards_are_mended_by_preparing_again(tmp_path, digits):
    shards = Path(shutil.copytree(digits, tmp_path / "shards"))
    os.truncate(shards / "shard-00001.tar", 70_000)
    assert fasttrain("prepare", "digits", shards).status == 0
    assert contents(shards) == contents(digits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of three steps: its config and, beside it, its folder."""
    config = write_config(tmp_path_factory.mktemp("trained"), digits, training={"steps": 3})
    done = fasttrain("train", config)
    assert done.status == 0, done.err
    return config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.depth=3", ["model depth 2, this config says depth 3", "choose another run_dir"]),
        ("model.name=dit", ["model"]),
        ("optimizer.ema=[]", ["optimizer.ema as it was"]),
        ("seed=5", ["seed 0, this config says 5"]),
        ("diffusion.prediction=v", ["diffusion.prediction name 'x0', this config says name 'v'"]),
    ],
)
def test_a_checkpoint_of_another_model(trained, override, named):
    before = contents(trained.parent / "run")
    overrides = ["model={name: dit, depth: 2, width: 32, heads: 2}"] if override == "model.name=dit" else [override]
    assert_one_message(fasttrain("train", trained, *overrides, "training.steps=5"), "step-00000003", *named)
    assert contents(trained.parent / "run") == before


def test_a_run_without_checkpoints_has_nothing_to_sample(tmp_path, trained):
    run = Path(shutil.copytree(trained.parent / "run", tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    for command in (("sample", run), ("export", run, tmp_path / "out.safetensors")):
        assert_one_message(fasttrain(*command), "has no checkpoint yet", str(run))
    assert_one_message(fasttrain("sample", tmp_path), "is no run folder", "give the run_dir")


def test_a_damaged_checkpoint_is_not_sampled(tmp_path, trained):
    run = Path(shutil.copytree(trained.parent / "run", tmp_path / "run"))
    _flip_a_bit(run / "checkpoints" / "step-00000003" / "rank-00000.safetensors")
    assert_one_message(fasttrain("sample", run, "--out", tmp_path / "out"), "can be trusted", "does not match its digest")
    assert not (tmp_path / "out").exists()


def test_the_traceback_is_there_for_who_asks(tmp_path, digits):
    done = fasttrain("train", write_config(tmp_path, digits, training={"stepps": 3}), "--debug")
    assert done.status not in (0, 2) and "Traceback" in done.err and "training.stepps" in done.err


def test_a_stock_interpreter_ends_with_status_2_too(tmp_path):
    """As a user starts it: no forked process, the installed entry point's own exit."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "fasttrain", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert_one_message(Done(done.returncode, done.stdout, done.stderr), f"cannot read the config {tmp_path / 'none.yaml'}")


# No space left. Each test fills a file system of its own, and says how many bytes are to be left.


def test_no_space_for_shards_known_beforehand(disk):
    out = disk(2 << 20) / "digits"
    assert_one_message(fasttrain("prepare", "digits", out), str(out), "are free; free some space")
    assert not (out / "index.json").exists() and not list(out.glob("*.tar*"))


def test_no_space_for_shards_met_on_the_way(disk, digits):
    """Enough for the shards and not for what comes after them."""
    folder = disk(8 << 20)
    shards = sum(path.stat().st_size for path in digits.glob("*.tar"))
    ballast = fill(folder, shards + (24 << 10))
    assert_one_message(fasttrain("prepare", "digits", folder / "digits"), "no space left; free some and run the same command again")
    assert not (folder / "digits" / "index.json").exists() and not list(folder.rglob("*.tmp"))
    ballast.unlink()
    assert fasttrain("prepare", "digits", folder / "digits").status == 0
    assert contents(folder / "digits") == contents(digits)


def test_no_space_for_a_checkpoint_leaves_the_one_before(disk, trained):
    folder = disk(8 << 20)
    shutil.copytree(trained.parent / "run", folder / "run")
    before = contents(folder / "run" / "checkpoints")
    size = Manifest.read(folder / "run" / "checkpoints" / "step-00000003").files["rank-00000.safetensors"].bytes
    ballast = fill(folder, size // 2)
    command = ("train", trained, f"run_dir={folder / 'run'}", "training.steps=5", "checkpoint.every=1", "checkpoint.retry_seconds=0")
    assert_one_message(fasttrain(*command), "no checkpoint of step 4 was saved; those before it are intact", "make room")
    assert contents(folder / "run" / "checkpoints") == before
    ballast.unlink()
    done = fasttrain(*command)
    assert done.status == 0 and "continuing from step-00000003" in done.out
    newest, manifest, _ = newest_sound(folder / "run")
    assert manifest.progress.step == 5
    assert all(torch.isfinite(weight).all() for weight in read_weights(newest, manifest, "ema").values())


def test_no_space_for_a_new_run(disk, trained):
    folder = disk(1 << 20)
    fill(folder, 0)
    assert_one_message(fasttrain("train", trained, f"run_dir={folder / 'run'}"), "cannot write there: No space left on device")


def test_no_space_in_the_middle_of_training(disk, trained):
    """Records wait for room, and the last save does too: then the run ends, and goes on from its checkpoint once there is room."""
    folder = disk(8 << 20)
    shutil.copytree(trained.parent / "run", folder / "run")
    before = contents(folder / "run" / "checkpoints")
    ballast = fill(folder, 24 << 10)
    command = ("train", trained, f"run_dir={folder / 'run'}", "training.steps=40", "checkpoint.every=100", "checkpoint.retry_seconds=1")
    told = "no checkpoint of step 40 was saved; those before it are intact (the newest is step-00000003)"
    assert_one_message(fasttrain(*command), told, "No space left on device; make room")
    assert contents(folder / "run" / "checkpoints") == before
    ballast.unlink()
    done = fasttrain(*command)
    assert done.status == 0 and "continuing from step-00000003" in done.out
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 40, "and no line is half a record"


def test_no_space_for_samples(disk, trained):
    folder = disk(1 << 20)
    fill(folder, 16 << 10)
    command = ("sample", trained.parent / "run", "--out", folder / "out", "--count", "16", "--steps", "2")
    assert_one_message(fasttrain(*command), f"--out {folder / 'out'}: cannot write there: No space left on device; make room")
    for path in folder.glob("out/*.png"):
        assert np.asarray(Image.open(path)).shape == (8, 8), "what stands there is whole"
    assert not (folder / "out" / "samples.npz").exists() and not list(folder.rglob("*.tmp"))


def test_no_space_for_an_export(disk, trained):
    folder = disk(1 << 20)
    (folder / "model.safetensors").write_text("the one before")
    fill(folder, 16 << 10)
    assert_one_message(fasttrain("export", trained.parent / "run", folder / "model.safetensors"), "cannot write", "make room")
    assert (folder / "model.safetensors").read_text() == "the one before"
    assert sorted(path.name for path in folder.iterdir()) == ["ballast", "model.safetensors"]


def test_no_space_for_a_score(disk, trained, digits):
    folder = disk(1 << 20)
    fill(folder, 0)
    command = ("evaluate", trained.parent / "run", "--reference", digits, "--count", "16", "--steps", "2", "--out", folder / "scores")
    assert_one_message(fasttrain(*command), f"--out {folder / 'scores'}: cannot write there: No space left on device; make room")
    assert not list(folder.glob("scores/*"))
