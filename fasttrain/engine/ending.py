"""How a rank ends when the run cannot go on: stacks and verdict into the run folder, one message, and nothing that can prevent it."""

import contextlib
import errno
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttrain.engine.activity import Doing
from fasttrain.engine.host import machine
from fasttrain.engine.verdict import Verdict
from fasttrain.errors import Status, UserError
from fasttrain.files import write_whole

LONGEST_TOLD = 600  # characters of an error
WAKING_SECONDS = 2.0


def status_of(error: BaseException) -> int:
    """What a process ends with that this error ends."""
    if isinstance(error, UserError):
        return int(error.status)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return int(Status.USER_ERROR)
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def told(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:LONGEST_TOLD]
    if isinstance(error, torch.OutOfMemoryError):
        return f"its GPU's memory is full (lower training.micro_batch, or raise the ZeRO stage): {text}"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def within(seconds: float, function: Callable[..., Any], *arguments: Any) -> str | None:
    """Runs it in a thread and waits so long at most. Returns what kept it from ending well: a file system may hang with the run."""
    problem: list[str | None] = [f"it took longer than {seconds:g} s"]

    def run() -> None:
        try:
            function(*arguments)
            problem[0] = None
        except Exception as error:  # the process is about to end: whatever it is, it must not keep it from that
            problem[0] = told(error)

    thread = threading.Thread(target=run, name="fasttrain-ending", daemon=True)
    thread.start()
    thread.join(seconds)
    return problem[0]


def write_stacks(path: Path, verdict: Verdict, rank: int, doing: Doing, error: BaseException | None) -> None:
    """What this rank was doing, the error it has met if any, and the stacks of all its threads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [verdict.told, f"rank {rank}: {doing.what!r} of step {doing.step}, for {time.monotonic() - doing.since:.1f} s", ""]
    if error is not None:
        lines += ["met here, perhaps only as its echo:", *"".join(traceback.format_exception(error)).splitlines(), ""]
    with path.open("w") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def report(folder: Path, verdict: Verdict, rank: int, problem: str | None) -> None:
    """The one message of a run that cannot go on, and the verdict as a file beside the stacks.

    Args:
        rank: that tells it. Both sides of a cut link tell their own verdict, perhaps into the same folder.
        problem: why the stacks could not be written; they go to this rank's stderr then.
    """
    stacks = f"stacks of the living ranks: {folder}" if problem is None else f"no stacks in {folder}: {problem}; this rank's follow"
    print(
        f"fasttrain: {verdict.told}. The run ends on all ranks, start it again (status {verdict.status}); {stacks}",
        file=sys.stderr,
        flush=True,
    )
    if problem is not None:
        faulthandler.dump_traceback(2, all_threads=True)
    write_whole(folder / f"verdict-rank-{rank:05d}.json", verdict.json())


def end_stopped(verdict: Verdict) -> None:
    """Wakes the silent ranks of this machine, so that they write their stacks and end; ends those that do not.

    A launcher would wait half a minute for a stopped process to answer its SIGTERM.
    """
    mine = [pid for where, pid in verdict.stopped if where == machine() and pid != os.getpid()]
    for number in (signal.SIGUSR2, signal.SIGCONT):
        _signal(mine, number)
    deadline = time.monotonic() + WAKING_SECONDS
    while any(_lives(pid) for pid in mine) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(mine, signal.SIGKILL)


def _signal(processes: list[int], number: int) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _lives(pid: int) -> bool:
    """Whether it runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
