"""Whose a comparison's folder is: one comparison's, with the configs that its arms were begun with, and one harness's at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import convergence_presets
from benchmarks.convergence_folder import Folder, held
from benchmarks.convergence_presets import Preset
from fasttrain.errors import UserError
from tests.benchmarks.test_convergence_presets import raw

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/digits/convergence.yaml"


@pytest.fixture
def preset() -> Preset:
    return Preset.model_validate(raw())


def test_a_folder_belongs_to_one_comparison(tmp_path, preset):
    Folder(tmp_path).begin(preset)
    Folder(tmp_path).begin(preset)
    with pytest.raises(UserError, match="it differs in seeds"):
        Folder(tmp_path).begin(preset.model_copy(update={"seeds": 7}))


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


def test_an_arm_whose_config_has_changed_is_refused_with_its_key(tmp_path, own_config):
    folder = Folder(tmp_path / "work")

    def preset() -> Preset:  # anew each time: it remembers what it has loaded
        return Preset.model_validate(raw(config="mine.yaml"))

    folder.begin(preset())
    run = list(preset().runs())[1]
    changed(own_config, "optimizer", weight_decay=0.1)
    folder.begin(preset())
    folder.begin_run(run, preset())
    changed(own_config, "optimizer", weight_decay=0.15)
    folder.begin(preset())  # nothing was made of it yet
    folder.begin_run(run, preset())
    (folder.run(run) / "checkpoints").mkdir(parents=True)
    folder.begin(preset())
    # The same text of the preset, another config.
    changed(own_config, "optimizer", weight_decay=0.2)
    with pytest.raises(UserError, match=r"arm x0 min_snr was made with optimizer\.weight_decay 0\.15, and its config has 0\.2 now"):
        folder.begin(preset())
    folder.begin_run(run, preset())
    assert folder.begun(run)["config"]["optimizer"]["weight_decay"] == 0.15 and "commit" in folder.begun(run)


def test_a_run_that_does_not_tell_its_config_is_refused(tmp_path, preset):
    folder = Folder(tmp_path)
    (folder.run(next(preset.runs())) / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="does not tell the config of arm x0 const"):
        folder.begin(preset)


def test_a_mistake_in_any_arm_is_told_before_anything_is_made(tmp_path):
    arms = {"a": [], "b": ["optimizer.learning_rte=1"]}
    preset = Preset.model_validate(raw(groups={"x0": {"baseline": "a", "contender": "b", "arms": arms}}))
    with pytest.raises(UserError, match="arm x0 b"):
        Folder(tmp_path).begin(preset)
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
