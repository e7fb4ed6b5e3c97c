"""Whose a folder of runs is: one data set's, and one harness's at a time; runs are known by what they are, and shared by it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import convergence_presets
from benchmarks.convergence_folder import Folder, held
from benchmarks.convergence_presets import Preset, Run
from fasttrain.errors import UserError
from tests.benchmarks.test_convergence_presets import raw

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/digits/convergence.yaml"


@pytest.fixture
def preset() -> Preset:
    return Preset.model_validate(raw())


def test_a_folder_belongs_to_one_data_set(tmp_path, preset):
    Folder(tmp_path, preset).begin()
    Folder(tmp_path, preset.model_copy(update={"seeds": 7})).begin()
    other = Preset.model_validate(raw(data={"prepare": ["images", "here"]}))
    with pytest.raises(UserError, match=r"holds runs on other data .*digits"):
        Folder(tmp_path, other).begin()


def test_comparisons_share_the_runs_that_are_the_same_whatever_their_names(tmp_path, preset):
    """And no others: not of another budget, not scored otherwise."""
    arms = {"plain": ["diffusion.weighting=const"], "gamma 1": ["diffusion.weighting={name: min_snr, gamma: 1}"]}
    groups = {"gamma": {"baseline": "plain", "contender": "gamma 1", "arms": arms}}
    here, there = Folder(tmp_path, preset), Folder(tmp_path, Preset.model_validate(raw(seeds=1, groups=groups)))
    const, plain = Run("x0", "const", 0), Run("gamma", "plain", 0)
    here.begin_run(const)
    assert there.begun(plain)["arm"] == "const" and there.scores(plain) == here.scores(const)
    assert there.begun(Run("gamma", "gamma 1", 0)) is None and here.begun(Run("x0", "const", 1)) is None
    for changes in (
        {"steps": 128, "points": [32, 64, 128]},
        {"score": {"weights": ["ema", "ema_1"], "fixed": "ema_1", "count": 101, "steps": 4}},
    ):
        assert Folder(tmp_path, Preset.model_validate(raw(**changes))).begun(const) is None, changes
    noisier = {"weights": ["ema", "ema_1"], "fixed": "ema", "count": 100, "steps": 4, "noise_seeds": 3}
    assert Folder(tmp_path, Preset.model_validate(raw(score=noisier))).begun(const) is not None


def test_equal_arms_are_one_run(tmp_path):
    arms = {"a": [], "b": ["optimizer.weight_decay=0.03"], "c": ["optimizer.weight_decay=0.04"]}  # the config has 0.03
    folder = Folder(tmp_path, Preset.model_validate(raw(groups={"x0": {"baseline": "a", "contender": "c", "arms": arms}})))
    assert folder.distinct() == [Run("x0", arm, seed) for seed in (0, 1) for arm in ("a", "c")]


@pytest.fixture
def own_config(tmp_path, monkeypatch) -> Path:
    """A config of the test's own, which may change."""
    monkeypatch.setattr(convergence_presets, "ROOT", tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / CONFIG).read_text())
    return path


def changed(path: Path, section: str, **values: object) -> None:
    config = yaml.safe_load(path.read_text())
    config[section].update(values)
    path.write_text(yaml.safe_dump(config))


def test_an_arm_whose_config_has_changed_is_another_run(tmp_path, own_config):
    def folder() -> Folder:  # anew each time: a comparison remembers what it has loaded
        return Folder(tmp_path / "work", Preset.model_validate(raw(config="mine.yaml")))

    run = Run("x0", "min_snr", 0)
    folder().begin_run(run)
    assert folder().begun(run)["config"]["optimizer"]["weight_decay"] == 0.03 and "commit" in folder().begun(run)
    changed(own_config, "optimizer", weight_decay=0.1)
    assert folder().begun(run) is None


def test_a_mistake_in_any_arm_is_told_before_anything_is_made(tmp_path):
    arms = {"a": [], "b": ["optimizer.learning_rte=1"]}
    preset = Preset.model_validate(raw(groups={"x0": {"baseline": "a", "contender": "b", "arms": arms}}))
    with pytest.raises(UserError, match="arm x0 b"):
        Folder(tmp_path, preset).begin()
    assert not list(tmp_path.iterdir())


def test_two_harnesses_in_one_folder_are_refused_until_the_first_is_gone(tmp_path):
    code = f"import sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    code += "from pathlib import Path; from benchmarks.convergence_folder import held\n"
    code += f"with held(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="another harness works in"), held(tmp_path):
                pass
        finally:
            first.kill()
    with held(tmp_path):
        pass
