"""One training at a time in a folder: the second is refused by the holder's name, and a dead holder holds nothing."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.lock import locked
from tests.living import living
from tests.ranks import run_ranks


def _hold(folder: Path) -> None:
    with locked(folder, distributed.start(60)):
        print("held", flush=True)
        time.sleep(60)


def _try(processes: Processes, folder: Path, seconds: float) -> tuple[str, float]:
    began = time.monotonic()
    try:
        with locked(folder, processes, seconds):
            return "held", time.monotonic() - began
    except UserError as error:
        return str(error), time.monotonic() - began


def test_a_second_training_is_refused_on_all_ranks_and_names_the_first(tmp_path: Path):
    with living(1, tmp_path, _hold, tmp_path / "run") as first:
        first.wait_for("held")
        outcomes = run_ranks(2, _try, tmp_path / "run", 0.5)
        pid = first.processes[0].pid
    assert all(f"is being trained in by pid {pid} on " in told and "choose another run_dir" in told for told, _ in outcomes)


def test_a_killed_holder_holds_nothing_and_a_dying_one_is_waited_for(tmp_path: Path):
    with living(1, tmp_path, _hold, tmp_path / "run") as first:
        first.wait_for("held")
        pid = first.processes[0].pid
        assert pid is not None
        killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(3); os.kill({pid}, {int(signal.SIGKILL)})"])
        [(told, took)] = run_ranks(1, _try, tmp_path / "run", 30.0)
        killer.wait()
    assert told == "held"
    assert took < 10
    assert [told for told, _ in run_ranks(1, _try, tmp_path / "run", 0.0)] == ["held"]


def _hold_without_locks(folder: Path) -> None:
    """As on a file system that knows none: the kernel's answer there is this error."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = refuse
    _hold(folder)


def test_a_file_system_without_locks_is_told(tmp_path: Path):
    with living(1, tmp_path, _hold_without_locks, tmp_path / "run") as rank:
        rank.wait_for("held")
        assert rank.output(0).count("this file system has no locks; see to it that no two trainings share the folder") == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"pid": "x"}', b"{" * 2000])
def test_what_stands_in_the_file_cannot_break_the_message(tmp_path: Path, content: bytes):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock").write_bytes(content)
    descriptor = os.open(folder / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "trained in by another process" in run_ranks(1, _try, folder, 0.0)[0][0]
    os.close(descriptor)
