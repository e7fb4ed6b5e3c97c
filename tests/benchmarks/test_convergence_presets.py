"""The comparisons that come with the repository load arm by arm, and mistakes in one of the user's are told."""

import math

import pytest
import yaml
from sklearn.datasets import load_digits

from benchmarks.convergence_presets import FOLDER, Preset, Run, names, read_preset
from fasttrain.errors import UserError


def raw(**changes):
    """A comparison as its file holds it."""
    base = {
        "about": "a test",
        "config": "configs/digits/convergence.yaml",
        "data": {"prepare": ["digits"]},
        "seeds": 2,
        "steps": 96,
        "points": [32, 64, 96],
        "score": {"weights": ["ema", "ema_1"], "fixed": "ema_1", "count": 100, "steps": 4},
        "groups": {
            "x0": {"baseline": "const", "contender": "min_snr", "arms": {"const": ["diffusion.weighting=const"], "min_snr": []}},
        },
    }
    return {**base, **changes}


@pytest.mark.parametrize("name", names())
def test_every_arm_of_every_preset_loads_and_saves_its_points(name):
    preset = read_preset(name)
    for run in preset.runs():
        if run.seed:
            continue
        config = preset.config_of(run)
        assert config.training.steps == preset.steps and config.training.global_batch == preset.batch
        assert all(step % config.checkpoint.keep_every == 0 and step % config.checkpoint.every == 0 for step in preset.points)
        assert config.checkpoint.keep_every % config.checkpoint.every == 0
        averages = {"raw", *(f"ema_{number}" if number else "ema" for number in range(len(config.optimizer.ema)))}
        assert averages.issuperset(preset.score.weights)


def test_the_issues_presets_are_there():
    assert set(names()) >= {"digits-smoke", "digits", "digits-full", "gamma", "strategies", "recipe", "cifar10", "imagenet256"}
    full = read_preset("digits-full")
    assert full.seeds == 5 and {name: list(group.arms) for name, group in full.groups.items()} == {
        target: ["const", "snr", "max_snr", "min_snr"] for target in ("x0", "eps", "v")
    }


def test_an_arms_own_words_stand_behind_its_groups():
    base = raw(overrides=["optimizer.learning_rate=3e-3", "optimizer.weight_decay=0.5"])
    base["groups"]["x0"]["overrides"] = ["diffusion.weighting=snr", "optimizer.weight_decay=0.25"]
    preset = Preset.model_validate(base)
    runs = list(preset.runs())
    assert runs == [Run("x0", arm, seed) for seed in (0, 1) for arm in ("const", "min_snr")]
    const, min_snr = (preset.config_of(run) for run in runs[:2])
    assert type(const.diffusion.weighting).__name__ == "Const" and type(min_snr.diffusion.weighting).__name__ == "Snr"
    assert const.optimizer.weight_decay == 0.25
    assert const.optimizer.learning_rate == 3e-3 and preset.config_of(runs[2]).seed == 1
    assert preset.save_every == math.gcd(128, 32, 64, 96)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"groups": {}}, "groups: "),
        ({"data": {"prepare": []}}, "data: either train"),
        ({"data": {"train": "data/digits", "prepare": ["digits"]}}, "data: either train"),
        ({"points": [64, 32, 96]}, "points must rise"),
        ({"points": [32, 64]}, "to steps"),
        ({"seed": 3}, "seed: Extra inputs"),
        ({"thresholds": [0.5, 2.0]}, "fractions of the budget"),
        ({"score": {"weights": ["ema"], "fixed": "raw", "count": 100, "steps": 4}}, "score.fixed 'raw'"),
        ({"groups": {"x0": {"baseline": "cnst", "contender": "a", "arms": {"a": []}}}}, "baseline 'cnst' is none of the arms: a"),
    ],
)
def test_mistakes_are_told(tmp_path, changes, told):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw(**changes)))
    with pytest.raises(UserError, match=told):
        read_preset(tmp_path / "mine.yaml")


def test_a_mistake_in_an_arm_names_it():
    preset = Preset.model_validate(raw(groups={"x0": {"baseline": "a", "contender": "b", "arms": {"a": [], "b": ["model.dpeth=3"]}}}))
    with pytest.raises(UserError, match=r"arm x0 b: [^$]*dpeth"):
        preset.config_of(Run("x0", "b", 0))


def test_edm_arms_know_the_digits_deviation():
    pixels = load_digits().images / 8 - 1
    preset = read_preset("recipe-screen")
    for group, arm, times in (
        ("weighting", "edm weighting", 1),
        ("target", "preconditioned", 1),
        ("target", "EDM", 2),
        ("target", "EDM, min_snr", 2),
    ):
        diffusion = preset.config_of(Run(group, arm, 0)).diffusion
        told = [part.sigma_data for part in (diffusion.weighting, diffusion.prediction) if hasattr(part, "sigma_data")]
        assert told == pytest.approx([pixels.std()] * times, rel=0.01)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="digits-smoke"):
        read_preset("digitz")


def test_files_of_the_command_line_take_their_places():
    preset = read_preset("cifar10")
    with pytest.raises(UserError, match="--images"):
        preset.filled({})
    assert preset.filled({"images": "c.tar"}).data.prepare == ("images", "c.tar", "--size", "32")
    assert FOLDER.is_dir()
