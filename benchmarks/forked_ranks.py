"""Real ranks of `fasttrain train CONFIG` for fault trials, each a process of its own that announces what it does.

The processes are forked from a server that has imported once what a training needs, so that a start takes a second instead of six.
From there on everything is the command's own: its process group, its signals, its exit status.
"""

import multiprocessing
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.moments import SAVING, TRAINING, Moment, announce
from fasttrain.cli import main
from tests.ranks import PRELOADED

_server = multiprocessing.get_context("forkserver")


class Rank:
    """One rank of a run: its process, and the moments that it has announced."""

    def __init__(self, number: int, world_size: int, port: int, config: Path, out: Path):
        _server.set_forkserver_preload(PRELOADED)
        reader, writer = _server.Pipe(duplex=False)
        self.number, self.out = number, out
        self.process = _server.Process(target=_run, args=(number, world_size, port, config, out, os.getcwd(), writer))
        self.moments: list[Moment] = []
        self.announced: Connection | None = reader
        self._half = b""
        self.process.start()
        writer.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def read(self) -> None:
        """Takes in what was announced since; the pipe's end is the process's."""
        if self.announced is None:
            return
        raw = os.read(self.announced.fileno(), 1 << 16)
        *lines, self._half = (self._half + raw).split(b"\n")
        self.moments += map(Moment.of, lines)
        if not raw:
            self.announced.close()
            self.announced = None

    def first_step(self) -> int | None:
        """The step that it began with; None where it began none."""
        return next((moment.step for moment in self.moments if moment.what == "data"), None)

    def died_in(self) -> str:
        """What it was doing when it died: its saving, where it was saving, else its training thread."""
        saving, training = self._last(saving=True), self._last(saving=False)
        return saving.what if saving is not None and saving.what != SAVING[-1] else training.what if training else "starting"

    def finished_step(self) -> int:
        """The last step that its training thread had left behind."""
        last = self._last(saving=False)
        return 0 if last is None else last.step - (last.what in TRAINING)

    def _last(self, saving: bool) -> Moment | None:
        return next((moment for moment in reversed(self.moments) if (moment.what in SAVING) == saving), None)


class Ended(NamedTuple):
    """How a start of a run ended: each rank's status (negative: killed by that signal), and when its process was gone."""

    statuses: list[int]
    at: list[float]


class Start:
    """One start of a run on several ranks, in their own processes."""

    def __init__(self, config: Path, world_size: int, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.began = time.monotonic()
        self.ranks = [Rank(number, world_size, port, config, out / f"rank-{number}.txt") for number in range(world_size)]

    def watch(self, enough: Callable[[], bool], seconds: float) -> bool:
        """Reads what the ranks announce until it is enough; False where all have ended or time has passed before."""
        deadline = time.monotonic() + seconds
        while not enough():
            pipes = {rank.announced: rank for rank in self.ranks if rank.announced is not None}
            left = deadline - time.monotonic()
            if not pipes or left <= 0:
                return False
            for pipe in select.select(list(pipes), [], [], left)[0]:
                pipes[pipe].read()
        return True

    def wait(self, seconds: float) -> Ended:
        """Waits for every rank's end. Those that are still there after so many seconds are killed, and have the status -SIGKILL."""
        deadline = time.monotonic() + seconds
        at = [0.0] * len(self.ranks)
        while not all(at):
            self.watch(lambda: True, 0)
            for rank in self.ranks:
                rank.process.join(0)
                if not at[rank.number] and rank.process.exitcode is not None:
                    at[rank.number] = time.monotonic()
            if not all(at):
                self._read_a_moment()
                if time.monotonic() > deadline:
                    self.kill()
        self.watch(lambda: False, 1)
        return Ended([rank.process.exitcode or 0 for rank in self.ranks], at)

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)

    def told(self) -> str:
        """What the ranks printed."""
        return "\n".join(f"rank {rank.number}: {rank.out.read_text(errors='replace') if rank.out.exists() else ''}" for rank in self.ranks)

    def _read_a_moment(self) -> None:
        pipes = {rank.announced: rank for rank in self.ranks if rank.announced is not None}
        sentinels = [rank.process.sentinel for rank in self.ranks if rank.process.exitcode is None]
        for ready in select.select([*pipes, *sentinels], [], [], 0.5)[0]:
            if ready in pipes:
                pipes[ready].read()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(number: int, world_size: int, port: int, config: Path, out: Path, folder: str, announced: Connection) -> None:
    """A rank's process, from where the launcher would have started it."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    announce(announced.fileno())
    try:
        sys.exit(main(["train", str(config)]))
    except KeyboardInterrupt:  # as the interpreter ends: by the signal itself
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
