"""Whole commands for tests, each in a process of its own with its own streams and exit status.

The processes are forked from a server that has imported torch and DeepSpeed once (tests/ranks.py): a command starts in a tenth of a second
instead of four. DeepSpeed keeps its process groups for as long as its process lives, so one process trains once.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fasttrain.cli import main
from tests.ranks import TIMEOUT

_server = multiprocessing.get_context("forkserver")


class Done(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


def fasttrain(*arguments: str | Path, before: Callable[[], None] | None = None) -> Done:
    """Runs `fasttrain *arguments` in this working directory; `before` is called first in its process."""
    with tempfile.TemporaryDirectory() as scratch:
        streams = [os.path.join(scratch, name) for name in ("out", "err")]
        process = _server.Process(target=_run, args=([str(argument) for argument in arguments], streams, os.getcwd(), before))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
        out, err = (Path(stream).read_text() for stream in streams)
        assert process.exitcode is not None, f"fasttrain {arguments} hangs:\n{out}\n{err}"
        return Done(process.exitcode, out, err)


def _run(arguments: list[str], streams: list[str], folder: str, before: Callable[[], None] | None) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(main(arguments))
