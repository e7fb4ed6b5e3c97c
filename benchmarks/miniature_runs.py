"""The project's own commands in experiments: each in a process of its own, within a bound of time, and gone with who asked for it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.environment import ROOT
from fasttrain.cli import main

_server = multiprocessing.get_context("forkserver")
# What every command imports, once for all of them.
IMPORTED = [
    "deepspeed",
    "fasttrain.trainer",
    "fasttrain.data.vae",
    *(f"fasttrain.commands.{command}" for command in ("train", "sample", "evaluate")),
]
MOST_SHOWN = 4000  # characters of what a failed command printed
GRACE, GRACE_SHARE = 60.0, 0.1  # seconds before the end at which a command is asked to save, and the most of the whole time


class Spent(NamedTuple):
    """Seconds that a command took: by the clock, and of its own on processors (0 where it did not live to tell)."""

    seconds: float
    cpu_seconds: float


class NotDone(Exception):
    """A command did not do what was asked; `spent`: what it took all the same."""

    def __init__(self, message: str, spent: Spent):
        super().__init__(message)
        self.spent = spent


class TimeIsUp(NotDone):
    """The experiment's time ended before this command did."""


class CommandFailed(NotDone):
    """A command's status was not 0; the message holds what it printed."""

    def __init__(self, message: str, spent: Spent, status: int):
        super().__init__(message, spent)
        self.status = status


@dataclass
class Laboratory:
    """A folder for an experiment's files, and the time that it may take.

    Args:
        folder: logs of the commands go to `folder/logs`.
        minutes: from now on; what runs then is ended.
        grace: seconds before that at which what runs is asked to save and end; None: a minute, of a short time a tenth.
    """

    folder: Path
    minutes: float
    began: float = field(default_factory=time.monotonic)
    grace: float | None = None
    _numbers: list[int] = field(default_factory=lambda: [0])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        _server.set_forkserver_preload(IMPORTED)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    @property
    def seconds_left(self) -> float:
        """Until the end, at least 0."""
        return max(0.0, 60 * self.minutes - self.seconds)

    @property
    def _seconds_to_work(self) -> float:
        """Until what runs is asked to end."""
        grace = min(GRACE, GRACE_SHARE * 60 * self.minutes) if self.grace is None else self.grace
        return max(0.0, self.seconds_left - grace)

    def command(
        self, *arguments: str | Path, about: str, launcher: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Spent:
        """Runs `fasttrain *arguments` on one thread, from the repository's root; prints one line when it is done.

        Args:
            launcher: the words to start it with in a program of its own, such as `deepspeed --module fasttrain`; none: forked, in a second.
            environment: variables to set for it.

        Raises:
            TimeIsUp: no time is left, or it was not done in time: it was asked to save and end, and at the end of the time was ended.
            CommandFailed: its status was not 0.
        """
        if not self._seconds_to_work:
            raise TimeIsUp(f"{about}: not begun after {self.seconds:.0f} s of the experiment", Spent(0.0, 0.0))
        began, log = time.monotonic(), self._log(about)
        ours, theirs = _server.Pipe()
        words = [str(argument) for argument in arguments]
        process = _server.Process(target=_run, args=(words, log, list(launcher), dict(environment or {}), theirs))
        process.start()
        theirs.close()
        in_time = self._ended(process)
        spent = Spent(time.monotonic() - began, _told(ours))
        if not in_time:
            raise TimeIsUp(f"{about}: not done after {self.seconds:.0f} s of the experiment", spent)
        if process.exitcode:
            printed = log.read_text(errors="replace")[-MOST_SHOWN:]
            raise CommandFailed(f"fasttrain {' '.join(words)}: status {process.exitcode}\n{printed}", spent, process.exitcode)
        print(f"{self.seconds:6.0f} s  {about} ({spent.seconds:.0f} s)", flush=True)
        return spent

    def _ended(self, process: BaseProcess) -> bool:
        """Waits for a command's end, or makes it end in time; whether it ended by itself."""
        process.join(self._seconds_to_work)
        if process.exitcode is not None:
            return True
        process.terminate()
        process.join(self.seconds_left)
        process.kill()
        process.join()
        return False

    def _log(self, about: str) -> Path:
        with self._lock:
            self._numbers[0] += 1
            name = "".join(letter if letter.isalnum() else "-" for letter in about)
            return self.folder / "logs" / f"{self._numbers[0]:03d}-{name}.txt"


def side_by_side(jobs: Sequence[Any], workers: int) -> list[Any]:
    """What the jobs return, in their order, so many at a time; the first exception ends it, after those that run."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def overrides(**values: Any) -> list[str]:
    """`section__key=value` as the command line takes it: a double underscore stands for the dot."""
    return [f"{key.replace('__', '.')}={value}" for key, value in values.items()]


def _told(command: Connection) -> float:
    """What a command that has ended sent; 0 where it was killed before."""
    try:
        return command.recv() if command.poll() else 0.0
    except EOFError:
        return 0.0


def _run(words: list[str], log: Path, launcher: list[str], environment: dict[str, str], asker: Connection) -> None:
    """A command's process, which ends when the process that asked for it is gone."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    status = _launched(launcher + words, asker) if launcher else _here(words, asker)
    spent = os.times()
    asker.send(spent.user + spent.system + spent.children_user + spent.children_system)
    sys.exit(status)


def _here(words: list[str], asker: Connection) -> int:
    _when_gone(asker, lambda: os.kill(os.getpid(), signal.SIGKILL))
    torch.set_num_threads(1)
    return main(words)


def _launched(words: list[str], asker: Connection) -> int:
    process = subprocess.Popen(words)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    _when_gone(asker, process.terminate)
    return process.wait()


def _when_gone(asker: Connection, do: Callable[[], None]) -> None:
    """Calls when the other end of a pipe is closed, by whatever ended the process that held it."""

    def watch() -> None:
        asker.poll(None)  # nothing is ever sent this way: what can be read is the end
        do()

    threading.Thread(target=watch, daemon=True).start()
