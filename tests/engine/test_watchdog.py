"""A rank that dies, hangs, fails or is cut off: the others notice in time, name it, write their stacks and end; nobody waits for ever."""

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fasttrain.engine import distributed
from fasttrain.engine.activity import Activity
from fasttrain.engine.watchdog import Watchdog
from fasttrain.errors import Status, UserError
from tests.living import Living, living

LIMIT = 2.0
TIMEOUT = 60.0
SLACK = 5.0  # RELIABILITY: within the limit and five seconds


def _train(folder: Path, odd: int = -1, oddity: Callable[[], None] | None = None) -> None:
    """Steps of a collective each, under a watchdog; rank `odd` does something else in the middle of one."""
    processes, activity = distributed.start(TIMEOUT), Activity()
    with Watchdog(processes, activity, folder, LIMIT) as watchdog:
        watchdog.on_fault(_Rescue(processes.rank, folder))
        for step in range(1, 10_000):
            activity.begin("data", step)
            if step == 30 and processes.rank == odd and oddity is not None:
                oddity()
            time.sleep(0.002)
            activity.begin("update", step)
            processes.gather(step)
            if step == 20:
                print("training", flush=True)


class _Rescue:
    def __init__(self, rank: int, folder: Path):
        self.rank, self.folder = rank, folder

    def __call__(self, lowest: bool, seconds: float) -> None:
        (self.folder / f"rescued-{self.rank}-{lowest}").touch()


def _verdict(folder: Path) -> dict:
    """What the lowest rank concluded that tells: where rank 0 is at fault, each side may."""
    return json.loads(min((folder / "faults").glob("*/verdict-*.json")).read_text())


def _ends(ranks: Living, rank: int, within: float) -> float:
    """Seconds until this rank has ended with the status that gets it restarted."""
    began = time.monotonic()
    assert ranks.status(rank, within) == Status.RESTART, ranks.output(rank)
    return time.monotonic() - began


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_noticed_at_once_and_named(victim: int, tmp_path: Path):
    with living(3, tmp_path, _train, tmp_path) as ranks:
        ranks.wait_for("training")
        ranks.send(victim, signal.SIGKILL)
        others = [rank for rank in range(3) if rank != victim]
        assert sum(_ends(ranks, rank, SLACK) for rank in others) < SLACK
        outputs = [ranks.output(rank) for rank in others]
    assert sum(output.count(f"rank {victim} (host ") for output in outputs) >= 1
    assert all("Traceback" not in output for output in outputs)
    assert _verdict(tmp_path)["cause"] == "died"
    assert _verdict(tmp_path)["ranks"] == [victim]
    for rank in others:
        assert "_train" in (tmp_path / "faults" / "0001" / f"rank-{rank:05d}.txt").read_text()
    assert (tmp_path / f"rescued-{others[0]}-True").exists()
    assert (tmp_path / f"rescued-{others[1]}-False").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_noticed_in_the_limit_named_and_ended(victim: int, tmp_path: Path):
    with living(2, tmp_path, _train, tmp_path) as ranks:
        ranks.wait_for("training")
        ranks.send(victim, signal.SIGSTOP)
        took = _ends(ranks, 1 - victim, LIMIT + SLACK)
        assert took >= LIMIT / 2
        assert ranks.status(victim, SLACK) is not None, "the stopped rank was left behind"
    verdict = _verdict(tmp_path)
    assert (verdict["cause"], verdict["ranks"]) == ("silent", [victim])
    assert (tmp_path / "faults" / "0001" / f"rank-{1 - victim:05d}.txt").exists()


def _sleep() -> None:
    time.sleep(60)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_training_thread_that_hangs_in_its_data_is_named_with_its_stack(odd: int, tmp_path: Path):
    with living(2, tmp_path, _train, tmp_path, odd, _sleep) as ranks:
        ranks.wait_for("training")
        for rank in range(2):
            _ends(ranks, rank, LIMIT + SLACK)
        output = ranks.output(0)
    assert _verdict(tmp_path)["ranks"] == [odd]
    assert 'at "data" of step 30' in _verdict(tmp_path)["told"]
    assert output.count(f"rank {odd} (host") == 1
    assert "_sleep" in (tmp_path / "faults" / "0001" / f"rank-{odd:05d}.txt").read_text()


def _refuse() -> None:
    raise UserError("the shard is not to be read: prepare it again")


def _crash() -> None:
    raise KeyError("a bug of ours")


def _no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    ("oddity", "others", "told"),
    [(_refuse, 2, None), (_crash, 138, "KeyError: 'a bug of ours'"), (_no_memory, 138, "lower training.micro_batch")],
)
def test_an_error_in_one_rank_ends_the_others_without_an_echo(
    odd: int, oddity: Callable[[], None], others: int, told: str | None, tmp_path: Path
):
    with living(2, tmp_path, _train, tmp_path, odd, oddity) as ranks:
        assert ranks.status(1 - odd, 30) == others, ranks.output(1 - odd)
        assert ranks.status(odd, 30) == 1  # an error that nobody catches; the command line makes 2 of a UserError
        own, other = ranks.output(odd), ranks.output(1 - odd)
    assert own.count("Traceback") == 1
    assert "Traceback" not in other
    assert list(tmp_path.glob("faults/*/verdict-*.json")) == [] if told is None else told in _verdict(tmp_path)["told"]


def _leave(folder: Path) -> None:
    """Ends well, ranks one after another with more than the limit between them: a goodbye is no death, and no hang."""
    processes, activity = distributed.start(TIMEOUT), Activity()
    with Watchdog(processes, activity, folder, 1.0):
        for step in range(processes.rank * 8):
            activity.begin("reporting", step)
            time.sleep(0.2)
    distributed.finish()
    print("left", flush=True)


def test_ranks_that_end_well_leave_no_trace(tmp_path: Path):
    with living(3, tmp_path, _leave, tmp_path) as ranks:
        assert [ranks.status(rank, 30) for rank in range(3)] == [0, 0, 0], [ranks.output(rank) for rank in range(3)]
        assert all("left" in ranks.output(rank) and "fasttrain" not in ranks.output(rank) for rank in range(3))
    assert not (tmp_path / "faults").exists()


def test_one_process_alone_is_watched_too(tmp_path: Path):
    with living(1, tmp_path, _train, tmp_path, 0, _sleep) as ranks:
        _ends(ranks, 0, LIMIT + SLACK + 30)
        assert "is stuck" in ranks.output(0)
    assert _verdict(tmp_path)["ranks"] == [0]


def _hold_the_interpreter() -> None:
    """A C function that computes, or waits, without letting go of Python's lock: no thread of Python runs beside it."""
    ctypes.PyDLL(None).sleep(60)


def test_a_rank_whose_interpreter_is_locked_up_is_named_and_ends_with_its_stack(tmp_path: Path):
    with living(2, tmp_path, _train, tmp_path, 1, _hold_the_interpreter) as ranks:
        ranks.wait_for("training")
        _ends(ranks, 0, LIMIT + SLACK)
        assert ranks.status(1, SLACK) is not None, "the locked rank was left behind"
        assert "_hold_the_interpreter" in ranks.output(1)
    assert (_verdict(tmp_path)["cause"], _verdict(tmp_path)["ranks"]) == ("silent", [1])


def _patient(folder: Path) -> None:
    processes, activity = distributed.start(TIMEOUT), Activity()
    with Watchdog(processes, activity, folder, 1.0, patience={"data": 30.0}):
        if processes.rank == 1:
            activity.begin("data", 1)
            time.sleep(3.0)
        activity.begin("data", 1)
        activity.begin("update", 1)
        processes.barrier()


def test_what_may_last_longer_is_waited_for_by_all_ranks(tmp_path: Path):
    """Rank 0 waits in a collective far beyond the limit, but the rank behind is within its own."""
    with living(2, tmp_path, _patient, tmp_path) as ranks:
        assert [ranks.status(rank, 30) for rank in range(2)] == [0, 0], ranks.output(0)


def test_the_run_folder_cannot_keep_a_rank_from_ending(tmp_path: Path):
    (tmp_path / "faults").write_text("a file where a folder should be")
    with living(2, tmp_path, _train, tmp_path) as ranks:
        ranks.wait_for("training")
        ranks.send(1, signal.SIGKILL)
        _ends(ranks, 0, SLACK)
        output = ranks.output(0)
    assert "no stacks in" in output
    assert "Thread 0x" in output
    assert os.path.isfile(tmp_path / "faults")
