"""Starts a launcher's command again for as long as that helps, and never while anything of the start before still runs.

    0   done               not started again
    2   a user's mistake   not started again
    3   diverged           not started again
    else                   ended and started again, also after a 0 that left processes behind: what they belong to was cut off

A launcher may be killed alone, and DeepSpeed's then leaves its processes running. The supervisor is their subreaper: they become its own
children, and it ends them all before it starts anything new. SIGINT and SIGTERM go straight to the trainings below it, past launchers that
pass on none or only to one rank after another; with none here (other hosts run them) to the command itself.

No more than `restarts` in a `window`: a run that loses a node every few hours goes on for months, one that fails at every start ends soon.
Starts that fail fast are paused for, 1 s, 2 s, 4 s and so on. Knows nothing of configs, and imports no torch.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType

import psutil

from fasttrain.errors import Status, UserError

FINAL = (Status.DONE, Status.USER_ERROR, Status.DIVERGED)
SOON = 60.0  # seconds: a start that lasted less is one that failed
LONGEST_PAUSE = 60.0
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # prctl(2): PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER


@dataclass(frozen=True)
class Limits:
    """When to give up.

    Attributes:
        restarts: how many within the window.
        window: seconds.
        grace: seconds for what is left of a start to end by itself after SIGTERM.
    """

    restarts: int = 10
    window: float = 3600.0
    grace: float = 60.0


class Supervisor:
    """Runs one command until it is done, asked to stop, or given up.

    Args:
        command: the launcher's, as an argument list.
        stop: another command, which asks the training to stop in place of a signal; for launchers that kill on SIGTERM.
        say: takes each line that is told.
    """

    def __init__(self, command: Sequence[str], limits: Limits, stop: Sequence[str] = (), say: Callable[[str], None] | None = None):
        self._command = list(command)
        self._limits = limits
        self._stop = list(stop)
        self._say = say or _to_stderr
        self._asked: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._short_starts = 0
        self._restarted: deque[float] = deque()

    def run(self) -> int:
        """The status to end with: the command's own, or 128 + the signal's number after a stop that was asked for."""
        _prctl(_SUBREAPER, 1)
        with self._passing_signals_on():
            while True:
                began = time.monotonic()
                status = self._start_and_wait()
                left = self._end_what_is_left()
                if self._asked is not None:
                    return status if status in FINAL else 128 + self._asked
                if status in FINAL and not left:
                    return status
                told = f"{ended(status)} after {time.monotonic() - began:.0f} s{_left_words(left)}"
                if not self._may_restart(told, time.monotonic() - began):
                    return status if status in range(1, 256) else Status.RESTART
                if self._asked is not None:
                    return 128 + self._asked

    def _start_and_wait(self) -> int:
        """Runs the command once; how it ended, as 128 + the number where a signal ended it. Takes in what was orphaned below it."""
        try:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with(os.getpid())
            )
        except OSError as error:
            raise UserError(f"supervise: cannot start {self._command[0]!r}: {error.strerror}; give a program behind `--`") from None
        if self._asked is not None:  # asked between two starts
            self._pass_on(self._asked)
        while True:
            number, waited = os.waitpid(-1, 0)
            if number == self._child.pid:
                self._child.returncode = code = os.waitstatus_to_exitcode(waited)
                return code if code >= 0 else 128 - code

    def _may_restart(self, told: str, lasted: float) -> bool:
        now, limits = time.monotonic(), self._limits
        while self._restarted and now - self._restarted[0] > limits.window:
            self._restarted.popleft()
        if len(self._restarted) >= limits.restarts:
            self._say(f"{told}; given up: restarted {limits.restarts} times within {limits.window:g} s")
            return False
        self._restarted.append(now)
        self._short_starts = self._short_starts + 1 if lasted < SOON else 0
        pause = min(LONGEST_PAUSE, 2.0 ** (self._short_starts - 1)) if self._short_starts else 0.0
        again = f"; starting again{f' in {pause:.0f} s' if pause else ''} (restart {len(self._restarted)} of at most {limits.restarts}"
        self._say(f"{told}{again} within {limits.window:g} s)")
        while self._asked is None and (left := now + pause - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return True

    def _end_what_is_left(self) -> int:
        """Ends what the command left running: SIGTERM, on which trainings save, then SIGKILL. Returns how many there were."""
        seen: set[psutil.Process] = set()
        deadline = time.monotonic() + self._limits.grace
        while left := [p for p in psutil.Process().children(recursive=True) if _runs(p)]:
            for process in left:
                if time.monotonic() > deadline:
                    _send(process, signal.SIGKILL)
                elif process not in seen:
                    _send(process, signal.SIGTERM)
            seen.update(left)
            psutil.wait_procs(left, timeout=0.2)
        _reap()
        return len(seen)

    @contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        """SIGINT and SIGTERM are passed on; so is the terminal's end, as SIGTERM, unless `nohup` has it ignored."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked = signal.Signals(number)
            if self._child is not None and self._child.returncode is None:
                self._pass_on(self._asked)

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: signal.Signals) -> None:
        assert self._child is not None
        if self._stop:
            subprocess.Popen(self._stop, stdin=subprocess.DEVNULL)
            return
        passed = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for process in list(trainings(psutil.Process())) or [psutil.Process(self._child.pid)]:
            _send(process, passed)


def trainings(above: psutil.Process) -> Iterator[psutil.Process]:
    """The `fasttrain train` processes below this one, without what they started themselves."""
    for child in above.children():
        try:
            found = is_training(child.cmdline())
        except psutil.Error:
            continue
        if found:
            yield child
        else:
            yield from trainings(child)


def is_training(words: Sequence[str]) -> bool:
    """Whether a command line is that of `fasttrain train` itself, and not of a launcher that was given it."""
    if not words or not PurePath(words[0]).name.startswith(("python", "fasttrain")):
        return False
    rest = list(words if PurePath(words[0]).name == "fasttrain" else words[1:])
    while rest and rest[0].startswith("-") and rest[0] != "-m":  # the interpreter's own options, such as -u
        rest.pop(0)
    if rest[:1] == ["-m"]:
        rest.pop(0)
    return bool(rest) and PurePath(rest[0]).name == "fasttrain" and next((w for w in rest[1:] if not w.startswith("-")), "") == "train"


def ended(status: int) -> str:
    """How a command ended, in words."""
    if status == Status.RESTART:
        return f"ended with {status}: a process, node or link was lost"
    if status > 128 and status - 128 in set(signal.Signals):
        return f"ended with {status}: {signal.Signals(status - 128).name}"
    return f"ended with {status}"


def split_command(words: Sequence[str]) -> list[str]:
    """The command behind `--`.

    Raises:
        UserError: there is none.
    """
    command = list(words[1:] if words[:1] == ["--"] else words)
    if not command:
        raise UserError("supervise: no command; give one behind `--`: fasttrain supervise -- deepspeed --module fasttrain train CONFIG")
    return command


def _left_words(left: int) -> str:
    return f", leaving {left} process{'es' if left > 1 else ''} behind, which were ended" if left else ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):  # gone, or not ours to end
        process.send_signal(number)


def _reap() -> None:
    """Takes in the orphans that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _die_with(parent: int) -> Callable[[], None]:
    """In the new process: SIGTERM when the supervisor dies, also when it just has."""

    def prepare() -> None:
        _prctl(_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(Status.RESTART)

    return prepare


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _to_stderr(line: str) -> None:
    print(f"fasttrain supervise: {line}", file=sys.stderr, flush=True)
