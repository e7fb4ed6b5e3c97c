"""The project's own commands in experiments that fit a CPU: each in a process of its own, all within a bound of time."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT
from fasttrain.cli import main

_server = multiprocessing.get_context("forkserver")
# What every command imports, once for all of them.
IMPORTED = ["deepspeed", "fasttrain.trainer", "fasttrain.data.vae", "fasttrain.commands.train", "fasttrain.commands.sample"]
MOST_SHOWN = 4000  # characters of what a failed command printed


class TimeIsUp(Exception):
    """The experiment's time ended before this command did."""


class CommandFailed(Exception):
    """A command's status was not 0; the message holds what it printed."""


@dataclass
class Laboratory:
    """A folder for an experiment's files, and the time that it may take.

    Args:
        folder: logs of the commands go to `folder/logs`.
        minutes: from now on; what runs then is ended.
    """

    folder: Path
    minutes: float
    began: float = field(default_factory=time.monotonic)
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

    def command(self, *arguments: str | Path, about: str) -> None:
        """Runs `fasttrain *arguments` on one thread, from the repository's root; prints one line when it is done.

        Raises:
            TimeIsUp: it was not done in time, and was ended.
            CommandFailed: its status was not 0.
        """
        began, log = time.monotonic(), self._log(about)
        process = _server.Process(target=_run, args=([str(argument) for argument in arguments], log))
        process.start()
        process.join(self.seconds_left)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeIsUp(f"{about}: not done after {self.seconds:.0f} s of the experiment")
        if process.exitcode:
            printed = log.read_text(errors="replace")[-MOST_SHOWN:]
            raise CommandFailed(f"fasttrain {' '.join(map(str, arguments))}: status {process.exitcode}\n{printed}")
        print(f"{self.seconds:6.0f} s  {about} ({time.monotonic() - began:.0f} s)", flush=True)

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


def _run(arguments: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.exit(main(arguments))
