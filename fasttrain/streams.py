"""Output that may lose its reader: a terminal that is closed, a launcher or ssh session that dies.

Python raises BrokenPipeError where a line is printed then, and rich ends the process. A training is to save before it ends.
"""

import os
import sys
from typing import Any, TextIO


class Lasting:
    """A text stream that goes to nowhere once nobody reads it; in all else the stream that it stands for."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """What is buffered and what comes goes to /dev/null, from all threads and libraries."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlive_reader() -> None:
    """From here on this process's output may lose its reader."""
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)  # type: ignore[assignment]
