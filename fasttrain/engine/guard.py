"""A small process beside each rank that ends it when it has stopped for good: nobody on another host can.

A rank that is stopped (SIGSTOP, a debugger, a kernel that no longer runs it) cannot end by itself, and when it is the only one of its host
no other rank can signal it: its launcher would wait for it for ever, and nothing be started again. The guard hears a beat from the rank's
watchdog. After the limit without one it wakes the rank, which then notices for how long it was away and writes its stacks; one that still
lives some seconds later is killed. The guard ends with its rank, and at no signal that a launcher sends around.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from typing import Self

SLICE = 0.5  # seconds; one slice of silence is no more than that, however long the whole machine slept in it


class Guard:
    """Guards this process from now on; `beat` is to be called more often than every `limit` seconds until `close`.

    One that was woken has `waking` seconds to beat again.
    """

    def __init__(self, limit: float, waking: float = 5.0):
        # -I and -S: nothing but the standard library, 10 MB and 20 ms.
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(limit), str(waking)]
        # In the rank's own process group: Ctrl-Z stops both, which is no silence.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def beat(self) -> None:
        """Says that this process runs."""
        # A guard that hangs or was ended guards nobody, and must keep nobody from training.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, b".")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watch(process: int, limit: float, waking: float) -> None:
    """Waits until the process behind a descriptor has ended; wakes it, then ends it, where no beat comes for longer than allowed."""
    silent, woken = 0.0, False
    while True:
        ready, _, _ = select.select([0, process], [], [], SLICE)
        if process in ready:
            return
        beats = os.read(0, 1 << 16) if 0 in ready else b""
        if beats:
            silent, woken = 0.0, False
            continue
        if ready:  # the pipe has ended: closed in good order
            return
        silent += SLICE
        if not woken and silent > limit:
            signal.pidfd_send_signal(process, signal.SIGCONT)
            silent, woken = 0.0, True
        elif woken and silent > waking:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            return


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    process = os.pidfd_open(int(sys.argv[1]))
    if os.getppid() == int(sys.argv[1]):
        watch(process, float(sys.argv[2]), float(sys.argv[3]))


if __name__ == "__main__":
    main()
