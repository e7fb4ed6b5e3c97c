"""What is left of a run whose ranks do not all live: the share under way, and under ZeRO 0 the step that was reached."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from fasttrain import saving
from fasttrain.checkpoint import Manifest, newest_sound, read_weights
from fasttrain.engine.activity import Activity
from fasttrain.engine.distributed import Processes
from fasttrain.rescue import Rescue
from fasttrain.shares import write_share
from tests.ranks import run_ranks
from tests.runs import plain_config, start, trace, zero
from tests.saves import State, end_ranks, is_of_step, names, newest_of, plan_of, save, saver_of

RESCUED = 7


def _hang_in_a_step(processes: Processes, raw: dict[str, Any], steps: int) -> None:
    """Rank 1 stays away from the step after `steps`; rank 0 waits for it in backward, and saves from another thread."""
    trainer = start(processes, raw)
    for _ in range(steps):
        trainer.train_step()
    if not processes.is_main:
        time.sleep(5)
        os._exit(0)

    def save_and_end() -> None:
        time.sleep(1)
        assert trainer.activity.now.what == "backward"
        trainer.rescue(True, 3.0)
        os._exit(RESCUED)

    threading.Thread(target=save_and_end).start()
    trainer.train_step()


def test_under_zero_0_the_lowest_survivor_saves_the_step_that_was_reached(tmp_path: Path, digits: Path):
    def raw(name: str) -> dict[str, Any]:
        return plain_config(tmp_path / name, digits, deepspeed=zero(0))

    assert end_ranks(2, _hang_in_a_step, raw("run"), 3)[0] == RESCUED
    folder, manifest, passed_over = newest_sound(tmp_path / "run")
    assert (folder.name, manifest.world_size, passed_over) == ("step-00000003", 1, [])
    expected = run_ranks(2, trace, raw("whole"), 3)[0]["state"]
    for key, tensors in expected.items():
        saved = read_weights(folder, manifest, key)
        assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert names(tmp_path / "run") == ["latest", "step-00000003"]


def _rescue_beside(processes: Processes, run_dir: Path, stage: int, doing: str, lowest: bool) -> list[str]:
    """Rescues state of step 5 while the training thread is at `doing`."""
    saver, state, activity = saver_of(processes, run_dir), State(processes), Activity()
    save(saver, state, 4)
    saver.finish()
    state.take(5)
    activity.begin(doing, 6)
    Rescue(saver, state, activity, lambda: plan_of(state, 5, stage))(lowest, 1.0)  # type: ignore[arg-type]
    return names(run_dir)


def test_it_saves_nothing_in_an_update_nor_in_any_other_rank_nor_under_another_stage(tmp_path: Path):
    refused = [(0, "update", True), (0, "resuming", True), (0, "forward", False), (1, "forward", True)]
    for number, (stage, doing, lowest) in enumerate(refused):
        assert run_ranks(1, _rescue_beside, tmp_path / str(number), stage, doing, lowest) == [["latest", "step-00000004"]]
    [saved] = run_ranks(1, _rescue_beside, tmp_path / "run", 0, "forward", True)
    assert saved == ["latest", "step-00000004", "step-00000005"]
    newest = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert is_of_step(newest, 5) and Manifest.read(newest).progress.step == 5


class _Moving(State):
    """A state whose training thread goes on while it is copied."""

    def __init__(self, processes: Processes, activity: Activity):
        super().__init__(processes)
        self._copied, self._activity = self.fragments, activity
        del self.fragments

    def __getattr__(self, name: str) -> Any:
        if name != "fragments":
            raise AttributeError(name)
        self._activity.begin("update", 6)
        self._activity.begin("forward", 7)
        return self._copied


def _rescue_in_motion(processes: Processes, run_dir: Path) -> list[str]:
    activity = Activity()
    state = _Moving(processes, activity)
    activity.begin("forward", 6)
    saver = saver_of(processes, run_dir)
    Rescue(saver, state, activity, lambda: plan_of(state, 5, 0))(True, 1.0)  # type: ignore[arg-type]
    return list(run_dir.rglob("*"))  # type: ignore[arg-type]


def test_a_copy_that_an_update_went_through_is_not_saved(tmp_path: Path):
    assert run_ranks(1, _rescue_in_motion, tmp_path) == [[]]


def _die_after_the_share(processes: Processes, run_dir: Path) -> None:
    """Rank 1 is gone when its share is whole; rank 0's takes longer, and is waited for."""
    saver, state = saver_of(processes, run_dir), State(processes)
    save(saver, state, 1)
    saver.finish()
    if processes.is_main:
        saving.write_share = _slowly  # type: ignore[assignment]
    save(saver, state, 2)
    if processes.is_main:
        saver.settle(10)
        os._exit(RESCUED)
    assert saver._written.wait(10)
    os.kill(os.getpid(), signal.SIGKILL)


def _slowly(path: Path, slices: Any) -> Any:
    time.sleep(1)
    return write_share(path, slices)


def test_the_share_under_way_is_written_to_its_end_and_the_next_start_commits_all(tmp_path: Path):
    assert end_ranks(2, _die_after_the_share, tmp_path) == [RESCUED, -signal.SIGKILL]
    assert run_ranks(1, newest_of, tmp_path) == [("step-00000002", [])]
    assert is_of_step(tmp_path / "checkpoints" / "step-00000002", 2)
