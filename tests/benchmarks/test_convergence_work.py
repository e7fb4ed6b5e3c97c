"""What the harness asks of the commands and keeps of them, with a laboratory that runs none: endings, GPUs, and what a kill left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.convergence_folder import Folder
from benchmarks.convergence_presets import Preset, Run
from benchmarks.convergence_work import Worker
from benchmarks.miniature_runs import CommandFailed, Laboratory, Spent, TimeIsUp
from benchmarks.whole_file import write_json
from tests.benchmarks.test_convergence_presets import raw


class Written(Laboratory):
    """Writes down what it is asked for, and lets the test say how it ends."""

    def __init__(self, folder: Path, end: Callable[[str], None] = lambda about: None):
        super().__init__(folder, minutes=1)
        self.end, self.asked, self.words = end, [], []

    def command(self, *arguments, about, launcher=(), environment=None):
        self.asked.append((arguments[0], dict(environment or {})))
        self.words.append(arguments)
        self.end(about)
        return Spent(2.0, 1.0)


@pytest.fixture
def preset() -> Preset:
    return Preset.model_validate(raw(score={"features": "extractor", "weights": ["ema"], "fixed": "ema", "count": 100, "steps": 4}))


def raising(error: Exception) -> Callable[[str], None]:
    def end(about: str) -> None:
        raise error

    return end


@pytest.mark.parametrize(
    ("error", "ended"), [(TimeIsUp("late", Spent(7.0, 3.0)), "cut"), (CommandFailed("gone", Spent(7.0, 3.0), 9), "failed"), (None, "done")]
)
def test_what_a_command_took_is_kept_however_it_ended(tmp_path, preset, error, ended):
    folder, run = Folder(tmp_path, preset), Run("x0", "const", 1)
    worker = Worker(folder, Written(tmp_path, raising(error) if error else lambda about: None), devices=["0,1"])
    if error:
        with pytest.raises(type(error)):
            worker.do(run)
    else:
        worker.do(run)
    seconds = 7.0 if error else 2.0
    assert [(c["what"], c["ended"], c["seconds"], c["devices"]) for c in folder.seconds(run)] == [("train", ended, seconds, 2)]
    assert folder.begun(run)["config"]["diffusion"]["weighting"] == {"name": "const"}
    assert (folder.ending(run) is None) == bool(error)


def test_a_command_that_was_not_begun_leaves_no_line(tmp_path, preset):
    with pytest.raises(TimeIsUp):
        Worker(Folder(tmp_path, preset), Written(tmp_path, raising(TimeIsUp("late", Spent(0.0, 0.0))))).prepare()
    assert Folder(tmp_path, preset).seconds(None) == []


def test_commands_see_the_given_gpus_alone_and_without_any_none(tmp_path, preset):
    lab, run = Written(tmp_path), Run("x0", "const", 1)
    worker = Worker(Folder(tmp_path, preset), lab, devices=["2", "5"])
    worker.prepare()
    worker.do(run)
    seen = [(command, environment["CUDA_VISIBLE_DEVICES"]) for command, environment in lab.asked]
    assert seen == [("prepare", "2,5"), ("evaluate", "2,5"), ("train", "2")]
    assert [c["what"] for c in Folder(tmp_path, preset).seconds(None)] == ["prepare", "train the extractor"]
    lab = Written(tmp_path / "cpu")
    Worker(Folder(tmp_path / "cpu", preset), lab).prepare()
    assert {environment["CUDA_VISIBLE_DEVICES"] for _, environment in lab.asked} == {""}


@pytest.mark.parametrize("keep", [False, True])
def test_a_training_left_by_a_kill_after_its_last_line_is_removed_when_it_is_seen(tmp_path, preset, keep):
    folder, run, lab = Folder(tmp_path, preset), Run("x0", "const", 0), Written(tmp_path)
    write_json(folder.done(run), {"diverged": False, "last_step": 96, "commit": None})
    write_json(folder.run(run) / "config.json", {})
    Worker(folder, lab, keep_runs=keep).do(run)
    assert folder.run(run).exists() == keep and lab.asked == []
    assert json.loads(folder.done(run).read_text())["last_step"] == 96


def test_the_first_run_of_each_arm_is_scored_with_more_steps_too(tmp_path, preset):
    for seed, expected in ((0, ["4", "16"]), (1, ["4"])):
        lab, run = Written(tmp_path / str(seed)), Run("x0", "min_snr", seed)
        folder = Folder(tmp_path / str(seed), preset)
        (folder.run(run) / "checkpoints" / "step-00000096").mkdir(parents=True)
        Worker(folder, lab).do(run)
        evaluations = [words for words in lab.words if words[0] == "evaluate"]
        assert [words[words.index("--steps") + 1] for words in evaluations] == expected
        assert all(words[words.index("--sampler") + 1] == "dpm_solver" for words in evaluations)
