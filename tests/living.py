"""Ranks that are killed, stopped or end by themselves, for tests: real processes with their own exit status and output."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fasttrain.cli import main
from tests.ranks import _server, free_port


class Living:
    """Processes numbered as one group: `function(*arguments)` runs in each, its output goes to a file of its own."""

    def __init__(self, world_size: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]):
        port = free_port()
        self._outputs = [folder / f"rank-{rank}.out" for rank in range(world_size)]
        self.processes = [
            _server.Process(target=_rank, args=(rank, world_size, port, str(output), function, arguments))
            for rank, output in enumerate(self._outputs)
        ]
        for process in self.processes:
            process.start()

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def status(self, rank: int, seconds: float = 60.0) -> int | None:
        """What a rank ended with; None if it has not ended in so long."""
        self.processes[rank].join(seconds)
        return self.processes[rank].exitcode

    def output(self, rank: int) -> str:
        return self._outputs[rank].read_text()

    def wait_for(self, told: str, seconds: float = 60.0) -> None:
        """Waits until every rank has printed it."""
        deadline = time.monotonic() + seconds
        while not all(output.exists() and told in output.read_text() for output in self._outputs):
            assert time.monotonic() < deadline, [output.read_text() for output in self._outputs if output.exists()]
            time.sleep(0.01)


@contextmanager
def living(world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> Iterator[Living]:
    """Starts the ranks, and leaves none behind."""
    ranks = Living(world_size, folder, function, arguments)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()


def command(*arguments: str | Path) -> None:
    """`fasttrain *arguments`, for `living`."""
    sys.exit(main([str(argument) for argument in arguments]))


def _rank(rank: int, world_size: int, port: int, output: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    function(*arguments)
