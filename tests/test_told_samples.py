"""Samples of a model that is told captions and controls, through the real commands: whose words they show, and that all counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from fasttrain.cli import main
from fasttrain.prompts import read_prompts
from tests.commands import fasttrain
from tests.runs import plain_config
from tests.told_images import SIDE, write_told

STEPS = 40
FAST = ("--sampler", "euler", "--steps", "4", "--weights", "raw")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a very small mmDiT, trained until what it is told shows in its samples."""
    folder = tmp_path_factory.mktemp("told")
    model = {"name": "mmdit", "depth": 2, "width": 64, "heads": 2, "patch": 4, "controls": {"size": "low", "flip": "high"}}
    config = plain_config(
        folder / "run",
        write_told(folder),
        data={"flip": True},
        diffusion={"schedule": "flow", "prediction": "flow", "weighting": "flow", "timesteps": "logit_normal", "control_drop": 0.2},
        optimizer={"learning_rate": 1e-2},
        training={"steps": STEPS, "global_batch": 16},
        sampling={"every": STEPS, "count": 4, "sampler": {"name": "euler", "steps": 3}, "guidance": {"scale": 2, "controls": 1.5}},
        model=model,
    )
    config["model"] = model
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = fasttrain("train", folder / "run.yaml")
    assert done.status == 0, done.err
    return folder / "run"


def sampled(run: Path, out: Path, *arguments: str, count: int = 6) -> tuple[np.ndarray, list[str]]:
    """The images and their captions."""
    assert main(["sample", str(run), "--out", str(out), "--count", str(count), *FAST, *arguments]) == 0
    stored = np.load(out / "samples.npz")
    assert stored.files == ["arr_0"], "captions are no classes"
    return stored["arr_0"], (out / "captions.txt").read_text().splitlines()


def refusal(run: Path, out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["sample", str(run), "--out", str(out), "--count", "2", *FAST, *arguments]) == 2
    assert not out.exists()
    return capsys.readouterr().err


def test_training_draws_its_grid_with_the_run_s_own_captions(run):
    assert (run / "samples" / f"step-{STEPS:08d}.png").exists() and len(read_prompts(run).captions) == 16


def test_the_run_s_own_captions_take_turns_and_stand_beside_the_samples(run, tmp_path):
    images, captions = sampled(run, tmp_path / "own", count=20)
    own = read_prompts(run).captions
    assert captions == [own[i % 16] for i in range(20)] and images.shape == (20, SIDE, SIDE, 3)


def test_a_caption_that_the_run_keeps_needs_no_encoder(run, tmp_path):
    own = read_prompts(run).captions
    by_turns, _ = sampled(run, tmp_path / "own")
    second, captions = sampled(run, tmp_path / "second", "--prompt", f" {own[1]}")
    assert captions == [own[1]] * 6
    assert np.array_equal(second[1], by_turns[1]) and not np.array_equal(second[0], by_turns[0])
    empty, captions = sampled(run, tmp_path / "empty", "--prompt", "")
    assert captions == [""] * 6 and not np.array_equal(empty, second)


def test_a_control_may_be_given_apart_from_another(run, tmp_path):
    together, _ = sampled(run, tmp_path / "together", "--control", "size=4,4", "flip=1")
    apart, _ = sampled(run, tmp_path / "apart", "--control", "size=4,4", "--control", "flip=1")
    assert np.array_equal(together, apart)


def test_other_prompts_go_through_the_run_s_encoder(run, tmp_path):
    own, encoder = read_prompts(run).captions, str(run.parent / "encoder")
    file = tmp_path / "prompts.txt"
    file.write_text(f"{own[3]}\n\nseven of the nine\n")
    images, captions = sampled(run, tmp_path / "file", "--prompts", str(file), "--text-encoder", encoder)
    given, _ = sampled(run, tmp_path / "given", "--prompt", own[3], "--prompt", "seven of the nine", "--text-encoder", encoder)
    kept, _ = sampled(run, tmp_path / "kept", "--prompt", own[3])
    assert captions == [own[3], "seven of the nine"] * 3 and np.array_equal(images, given)
    # The encoder's batch may move a last bit of float16.
    assert np.abs(images[0].astype(int) - kept[0].astype(int)).max() <= 1 and not np.array_equal(images[1], kept[1])


def test_controls_count_and_default_to_an_uncropped_original_of_the_training_size(run, tmp_path):
    plain, _ = sampled(run, tmp_path / "plain")
    same, _ = sampled(run, tmp_path / "same", "--control", f"size={SIDE},{SIDE}", "flip=0")
    for told in ("size=90,20", "flip=1"):
        assert not np.array_equal(plain, sampled(run, tmp_path / told, "--control", told)[0]), told
    assert np.array_equal(plain, same)


def test_guidance_by_text_and_by_controls(run, tmp_path):
    makes = {
        "plain": (),
        "text": ("--guidance", "3"),
        "controls": ("--control-guidance", "2"),
        "both": ("--guidance", "3", "--control-guidance", "2"),
        "never": ("--guidance", "3", "--control-guidance", "2", "--guidance-interval", "0.001", "0.002"),
        "law": ("--guidance", "2", "--guidance-resolution", "2"),
    }
    drawn = {name: sampled(run, tmp_path / name, *arguments)[0] for name, arguments in makes.items()}
    assert np.array_equal(drawn["never"], drawn["plain"]) and np.array_equal(drawn["law"], drawn["text"])
    different = [drawn[name] for name in ("plain", "text", "controls", "both")]
    assert not any(np.array_equal(one, other) for i, one in enumerate(different) for other in different[:i])


def test_a_score_keeps_what_was_asked_for(run, tmp_path):
    how = ("--guidance", "2", "--control-guidance", "1.5", "--guidance-interval", "0.1", "0.9", "--control", "flip=1")
    reference = str(run.parent / "set")
    assert main(["evaluate", str(run), "--reference", reference, "--count", "20", *FAST, *how, "--out", str(tmp_path)]) == 0
    protocol = json.loads(next(tmp_path.glob("step-*-raw-pixels.json")).read_text())["protocol"]
    assert protocol["sampler"] == {"name": "euler", "steps": 4, "spacing": "trailing"}
    assert protocol["guidance"] == {"scale": 2.0, "controls": 1.5, "interval": [0.1, 0.9], "resolution": 1.0}
    conditions = protocol["conditions"]
    assert (conditions["captions"], conditions["controls"]) == (16, [SIDE, SIDE, 1]) and len(conditions["captions_xxh3"]) == 32


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompt", "a cat"), "the run keeps only 16 captions of its training set as text, and not this one: give --text-encoder"),
        (("--labels", "1"), "--labels: this run's model is told captions, not classes: give --prompt"),
        (("--control", "crop=0,0"), "--control 'crop': the run's model is not told that; "),
        (("--control", "size=16"), "--control size: give 2 numbers (height, width), not 1"),
        (("--control", "flip=yes"), "--control 'flip=yes': give a name and its numbers"),
        (("--control", "flip=nan"), "--control 'flip=nan': give a name and its numbers"),
        (("--prompts", "nowhere.txt"), "--prompts nowhere.txt: cannot be read"),
        (("--prompts", "/dev/null"), "--prompts /dev/null: holds no prompt"),
        (("--guidance-interval", "0.9", "0.1"), "the smaller first"),
        (("--text-encoder", "nowhere"), "--text-encoder: give --prompt or --prompts for it to encode"),
        (("--text-encoder-revision", "0" * 40), "--text-encoder-revision: give --text-encoder too"),
        (("--control", "size=4,4", "size=8,8"), "--control 'size': given twice"),
        (("--sampler", "euler", "name=heun"), "name is given twice"),
    ],
)
def test_what_cannot_be_asked_is_named(run, tmp_path, capsys, arguments, told):
    assert told in refusal(run, tmp_path / "out", capsys, *arguments)
