"""SIGKILL in the thread that saves: nothing half-written is ever taken for a checkpoint, and nothing complete is lost."""

import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from fasttrain import saving
from fasttrain.checkpoint import Checkpoints, newest_sound, step_of
from fasttrain.engine.distributed import Processes
from tests.ranks import run_ranks
from tests.saves import State, end_ranks, is_of_step, names, newest_of, save, saver_of

KILLS = 15


def _events_of_four_saves(processes: Processes, run_dir: Path) -> int:
    """How many calls the saving threads make, and returns from them, of Python's functions and of C's."""
    seen = [0]

    def count(frame: FrameType, event: str, argument: object) -> None:
        seen[0] += 1

    threading.setprofile(count)
    _save_on(processes, run_dir, 1, 4)
    return seen[0]


def _save_on(processes: Processes, run_dir: Path, first: int, count: int) -> None:
    saver, state = saver_of(processes, run_dir), State(processes)
    for step in range(first, first + count):
        save(saver, state, step)
        state.take(0)  # training goes on
    saver.finish()


def _save_until_killed(processes: Processes, run_dir: Path, after: int) -> None:
    """Goes on from the newest checkpoint, and dies at one of the saving thread's calls."""
    left = [after]

    def count(frame: FrameType, event: str, argument: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    found = Checkpoints(run_dir, processes).newest()
    threading.setprofile(count)
    _save_on(processes, run_dir, step_of(found[0]) + 1 if found else 1, 4)


def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint_that_loads(tmp_path: Path):
    chance = random.Random(0)
    events = run_ranks(1, _events_of_four_saves, tmp_path / "whole")[0] * 3 // 4  # they differ by a few from run to run
    run_ranks(1, _save_on, tmp_path, 1, 1)
    reached, killed = 1, 0
    for _ in range(KILLS):
        killed += end_ranks(1, _save_until_killed, tmp_path, chance.randrange(1, events))[0] == -signal.SIGKILL
        newest, manifest, passed_over = newest_sound(tmp_path)
        assert passed_over == [] and step_of(newest) == manifest.progress.step >= reached and is_of_step(newest, step_of(newest))
        reached = step_of(newest)
    assert killed == KILLS and reached > KILLS // 2


# Complete but for its rename.


def _die_at_the_commit(processes: Processes, run_dir: Path) -> None:
    saver, state = saver_of(processes, run_dir), State(processes)
    save(saver, state, 1)
    saver.finish()
    saving.commit = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    save(saver, state, 2)
    try:
        saver.finish()
    except RuntimeError:
        sys.exit(3)


def test_one_cut_off_just_before_its_rename_is_committed_by_the_next_start(tmp_path: Path):
    assert end_ranks(2, _die_at_the_commit, tmp_path / "run") == [-signal.SIGKILL, 3]
    assert names(tmp_path / "run") == ["latest", "step-00000001", "step-00000002.tmp"]
    partial = "checkpoints/step-00000002.tmp"
    for number, (file, harm) in enumerate(
        [("rank-00001.json", Path.unlink), ("plan.json", Path.unlink), ("rank-00000.safetensors", lambda path: os.truncate(path, 1000))]
    ):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "run", copy)
        harm(copy / partial / file)
        assert run_ranks(1, newest_of, copy) == [("step-00000001", [])], f"{file} is not whole"
    assert run_ranks(3, newest_of, tmp_path / "run") == [("step-00000002", [])] * 3
    assert names(tmp_path / "run") == ["latest", "step-00000001", "step-00000002"]
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert (newest.parent / "latest").read_text() == "step-00000002\n" and is_of_step(newest, 2)
    assert sorted(f.name for f in newest.iterdir()) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]


def test_one_cut_off_between_manifest_and_rename_is_committed_too(tmp_path: Path):
    run_ranks(1, _save_on, tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "step-00000002"
    newest.rename(newest.with_suffix(".tmp"))
    assert run_ranks(1, newest_of, tmp_path) == [("step-00000002", [])]
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]
