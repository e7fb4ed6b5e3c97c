"""Saving beside training: no step is mixed with another, and no failure ends the run or costs what was saved."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasttrain import saving
from fasttrain.checkpoint import Manifest, newest_sound, read_weights
from fasttrain.engine.distributed import Processes
from fasttrain.errors import DivergedError, UserError
from fasttrain.shares import write_share
from tests.commands import fasttrain
from tests.disks import fill, let_write
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero
from tests.saves import State, is_of_step, names, plan_of, save, saver_of, wait_until

# No step is mixed with another.


def _train_and_save_each_step(processes: Processes, raw: dict[str, Any], steps: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    trainer, states = start(processes, raw), []
    saving.write_share = _slow_write(0.03)  # the next step is under way before this one is written
    for _ in range(steps):
        trainer.train_step()
        trainer.save()
        states.append({key: trainer.state.full(key) for key in trainer.state.keys})
    trainer.saver.finish()
    trainer.loader.close()
    return states if processes.is_main else []


@pytest.mark.parametrize("stage", [0, 3])
def test_each_checkpoint_is_its_steps_state_bit_for_bit_while_training_goes_on(stage: int, tmp_path: Path, digits: Path):
    raw = plain_config(tmp_path / "run", digits, deepspeed=zero(stage), checkpoint={"keep_last": 100})
    states = run_ranks(2, _train_and_save_each_step, raw, 20)[0]
    for step, state in enumerate(states, start=1):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        manifest = Manifest.read(folder)
        for key, tensors in state.items():
            saved = read_weights(folder, manifest, key)
            assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items()), (step, key)


def _save_slowly(processes: Processes, run_dir: Path) -> tuple[float, float]:
    """What two saves cost where each takes half a second to write: the first nothing, the second the wait for the first."""
    saver, state = saver_of(processes, run_dir, keep_last=9), State(processes)
    saving.write_share = _slow_write(0.5)
    save(saver, state, 1)
    state.take(100)  # training goes on
    first = saver.stall_seconds
    save(saver, state, 2)
    second = saver.stall_seconds
    saver.finish()
    return first, second


def _slow_write(seconds: float) -> Callable[..., Any]:
    def write(path: Path, slices: Any) -> Any:
        time.sleep(seconds)
        return write_share(path, slices)

    return write


def test_a_step_pays_for_the_copy_alone_and_for_the_wait_where_saves_come_too_fast(tmp_path: Path):
    [(first, second)] = run_ranks(1, _save_slowly, tmp_path)
    assert first < 0.25 and second > 0.25
    assert all(is_of_step(tmp_path / "checkpoints" / f"step-0000000{step}", step) for step in (1, 2))


def test_a_share_is_plain_safetensors(tmp_path: Path):
    slices = {"a|master|0": torch.randn(1000), "b|master|5": torch.randn(1), "c|ema|0": torch.empty(0)}
    written = write_share(tmp_path / "share.safetensors", slices)
    read = load_file(tmp_path / "share.safetensors")
    assert read.keys() == slices.keys() and all(torch.equal(read[name], slices[name]) for name in slices)
    assert written.bytes == (tmp_path / "share.safetensors").stat().st_size


# What fails is tried again, and training goes on.


def _meet_a_full_disk(processes: Processes, folder: Path) -> tuple[list[str], list[str], bool]:
    """Saves a step, finds no room for the next two, and finds it again."""
    saver, state = saver_of(processes, folder, retry_seconds=60), State(processes)
    save(saver, state, 1)
    saver.finish()
    ballast = fill(folder, 100_000) if processes.is_main else None
    processes.barrier()
    save(saver, state, 2)
    wait_until(lambda: saver._trouble)
    during = names(folder)
    save(saver, state, 3)
    processes.barrier()
    if ballast is not None:
        ballast.unlink()
    saver.finish()
    processes.barrier()
    return during, saver.poll(), saver.failed is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_leaves_the_last_good_one_and_is_outlived(ranks: int, tmp_path: Path, disk: Any):
    folder = disk(2 << 20)
    told = run_ranks(ranks, _meet_a_full_disk, folder)
    assert all(fine for _, _, fine in told)
    assert set(told[0][0]) <= {"ballast", "latest", "step-00000001", "step-00000002.tmp"}
    first, *_, last = told[0][1]
    assert "step 2 is not saved yet" in first and "No space left on device; make room" in first and "trying again for 60 s" in first
    assert "step-00000003 is saved" in last and len(told[0][1]) == 2, "told once, and when it is over"
    assert [other for _, other, _ in told[1:]] == [[]] * (ranks - 1)
    assert names(folder) == ["latest", "step-00000001", "step-00000003"] and is_of_step(folder / "checkpoints" / "step-00000003", 3)


def _meet_a_limit(processes: Processes, run_dir: Path, limited: int) -> list[str]:
    """One rank alone may write no file larger than a few bytes, until it may again."""
    saver, state = saver_of(processes, run_dir, retry_seconds=60), State(processes)
    save(saver, state, 1)
    saver.finish()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if processes.rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    save(saver, state, 2)
    wait_until(lambda: saver._trouble)
    processes.barrier()
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000001\n"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    saver.finish()
    return saver.poll()


@pytest.mark.parametrize("limited", [0, 1])
def test_any_rank_that_cannot_write_is_named_and_waited_for(limited: int, tmp_path: Path):
    told = run_ranks(2, _meet_a_limit, tmp_path, limited)[0]
    assert f"rank {limited} could not" in told[0] and "File too large" in told[0]
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"] and is_of_step(tmp_path / "checkpoints/step-00000002", 2)


def _meet_a_read_only_disk(processes: Processes, folder: Path) -> list[str]:
    saver, state = saver_of(processes, folder, retry_seconds=60), State(processes)
    save(saver, state, 1)
    saver.finish()
    let_write(folder, False)
    save(saver, state, 2)
    wait_until(lambda: saver._trouble)
    let_write(folder, True)
    saver.finish()
    return saver.poll()


def test_a_disk_that_turned_read_only_is_outlived(disk: Any):
    folder = disk(4 << 20)
    [told] = run_ranks(1, _meet_a_read_only_disk, folder)
    assert "Read-only file system" in told[0] and names(folder) == ["latest", "step-00000001", "step-00000002"]


def _fail_for_good(processes: Processes, run_dir: Path, retry_seconds: float, at_a_stop: float | None) -> list[tuple[str | None, str]]:
    saver, state = saver_of(processes, run_dir, retry_seconds=retry_seconds), State(processes)
    save(saver, state, 1)
    saver.finish()
    saving.write_share = _refuse_on_the_last_rank(processes)
    save(saver, state, 2)
    caught = []
    for act in (lambda: saver.finish(at_a_stop), lambda: save(saver, state, 3)):
        with pytest.raises(UserError) as error:
            act()
        caught.append((saver.failed, str(error.value)))
    return caught


def _refuse_on_the_last_rank(processes: Processes) -> Callable[..., Any]:
    def write(path: Path, slices: Any) -> Any:
        if processes.rank == processes.world_size - 1:
            raise OSError(5, "Input/output error")
        return write_share(path, slices)

    return write


@pytest.mark.parametrize(("retry_seconds", "at_a_stop"), [(1.5, None), (600, 1.5)])
def test_when_the_time_is_over_every_rank_says_the_same(retry_seconds: float, at_a_stop: float | None, tmp_path: Path):
    begin = time.monotonic()
    told = run_ranks(2, _fail_for_good, tmp_path, retry_seconds, at_a_stop)
    assert time.monotonic() - begin < 30
    [message] = {text for rank in told for pair in rank for text in pair}
    assert "no checkpoint of step 2 was saved; those before it are intact (the newest is step-00000001): rank 1 could not write" in message
    assert names(tmp_path) == ["latest", "step-00000001"] and newest_sound(tmp_path)[0].name == "step-00000001"


def test_a_run_ends_with_status_2_when_saving_failed_for_good(tmp_path: Path, digits: Path):
    raw = plain_config(tmp_path / "run", digits, training={"steps": 3}, checkpoint={"every": 1, "retry_seconds": 0})
    path = tmp_path / "run.yaml"
    path.write_text(str(raw))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file in the way")
    done = fasttrain("train", path)
    assert done.status == 2 and "rank 0 could not make" in done.err and "there is none yet" in done.err and "Traceback" not in done.err


def _save_what_is_not_finite(processes: Processes, run_dir: Path) -> str:
    saver, state = saver_of(processes, run_dir), State(processes)
    save(saver, state, 1)
    saver.finish()
    state.take(2)
    if processes.rank == 1:
        state.fragments[-1].state["exp_avg"][0] = float("nan")
    saver.begin(state, plan_of(state, 2))  # type: ignore[arg-type]
    with pytest.raises(DivergedError, match="step 2 holds a non-finite value"):
        saver.finish()
    return (run_dir / "checkpoints" / "latest").read_text()


def test_a_state_that_is_not_finite_on_one_rank_is_saved_by_none(tmp_path: Path):
    assert run_ranks(2, _save_what_is_not_finite, tmp_path) == ["step-00000001\n"] * 2
    assert names(tmp_path) == ["latest", "step-00000001"]


# What is kept.


def _save_many(processes: Processes, run_dir: Path, steps: list[int], config: dict[str, Any], newest: int | None) -> None:
    saver, state = saver_of(processes, run_dir, **config), State(processes)
    if newest is not None:
        saver.continue_from(run_dir / "checkpoints" / f"step-{newest:08d}")
    for step in steps:
        save(saver, state, step)
        saver.finish()


def test_the_last_ones_are_kept_and_those_of_every_so_many_steps_for_good(tmp_path: Path):
    run_ranks(1, _save_many, tmp_path, list(range(1, 12)), {"keep_last": 2, "keep_every": 4}, None)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (4, 8, 10, 11))]


def test_one_that_was_passed_over_does_not_push_out_a_good_one(tmp_path: Path):
    """Step 10 was damaged, so the run went on from 5: 10 is not one of the last two, neither before nor after the run is past it."""
    run_ranks(1, _save_many, tmp_path, [5, 10], {}, None)
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").write_text("{}")
    run_ranks(1, _save_many, tmp_path, [7], {}, 5)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000007", "step-00000010"]
    run_ranks(1, _save_many, tmp_path, [11], {}, 7)
    assert names(tmp_path) == ["latest", "step-00000007", "step-00000011"]
