"""Files that a shell command writes to its output: `pipe:COMMAND`, only where the config allows it."""

import os
import select
import signal
import subprocess

from fasttrain.data.remote.addresses import PIPE
from fasttrain.data.remote.retry import PassingError

SILENCE = 60.0  # seconds without output before the command is ended


class PipeOpener:
    """Runs commands. A failure may always pass: a shell's status does not say what is missing."""

    def open(self, url: str, offset: int, version: str | None) -> "PipeStream":
        """See `Opener.open`; a command starts from the beginning each time."""
        return PipeStream(url.removeprefix(f"{PIPE}:"))


class PipeStream:
    """The output of one command, in a process group of its own. See `Stream`."""

    def __init__(self, command: str):
        self.start = 0
        self.size: int | None = None
        self.version: str | None = None
        self._process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._ready = select.poll()
        self._ready.register(self._output)

    def read(self, most: int) -> bytes:
        if not self._ready.poll(SILENCE * 1000):
            raise PassingError(f"the command wrote nothing for {SILENCE:.0f} s")
        content = os.read(self._output, most)
        if not content:
            self._check_status()
        return content

    def _check_status(self) -> None:
        """What came is whole only if the command says so."""
        try:
            status = self._process.wait(SILENCE)
        except subprocess.TimeoutExpired:
            raise PassingError("the command closed its output but does not end") from None
        if status:
            raise PassingError(f"the command ended with status {status}")

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
