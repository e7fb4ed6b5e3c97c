"""The launchers above this process: when one of them dies, the run is to stop, or its processes would train on as orphans.

The chain goes up from this process for as long as the ancestors are launchers, with shells that only run a command (`sh -c`) between them,
and ends with the ssh session that a launcher of another host started. It holds no interactive shell and no scheduler: closing the terminal
of a run under nohup ends nothing. Read from /proc; where there is none, no launcher is known.
"""

import ctypes
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

PROGRAMS = {"deepspeed", "deepspeed.pt", "torchrun", "pdsh", "mpirun", "mpiexec", "mpiexec.hydra", "orterun", "orted"} | {
    "prterun",
    "prte",
    "prted",
    "hydra_pmi_proxy",
    "hydra_bstrap_proxy",
}
MODULES = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"}
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "busybox"}
_DEATH_SIGNAL = 1  # prctl(2): PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Ancestor:
    """A process, and when it began (in the kernel's ticks): another one may get its number."""

    pid: int
    began: str
    name: str

    def lives(self) -> bool:
        """Whether it runs still; one that has ended and waits for its parent does not."""
        state = _stat(self.pid)
        return state is not None and state[0] not in "ZX" and state[19] == self.began


def launchers() -> list[Ancestor]:
    """The launchers above this process, the nearest first."""
    chain: list[Ancestor] = []
    between: list[Ancestor] = []
    for ancestor, command in _ancestors():
        if _is_plain_shell(command):
            between.append(ancestor)
        elif is_launcher(command):
            chain += [*between, ancestor]
            between = []
        else:
            # Under nohup the user has said that the session's end is not the run's.
            if chain and _is_session(command) and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                chain += [*between, ancestor]
            break
    return chain


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is a launcher's: by its program, or by the script or module that a Python runs."""
    if not command:
        return False
    program, rest = PurePath(command[0]).name, list(command[1:])
    if program.startswith("python"):
        while rest and rest[0].startswith("-") and rest[0] != "-m":
            rest = rest[2:] if rest[0] in ("-X", "-W") else rest[1:]
        if rest and rest[0] == "-m":
            module = rest[1] if len(rest) > 1 else ""
            return module in MODULES or (module == "fasttrain" and rest[2:3] == ["supervise"])
        program, rest = (PurePath(rest[0]).name, rest[1:]) if rest else ("", [])
    return program in PROGRAMS or (program == "fasttrain" and rest[:1] == ["supervise"])


def end_with_parent() -> None:
    """Asks the kernel for SIGTERM when this process's parent dies, if that is a launcher. Linux only."""
    above = launchers()
    if not above or above[0].pid != os.getppid():
        return
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != above[0].pid:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


class Orphanhood:
    """Asks this process to stop, as SIGTERM does, when one of the launchers above it has died. Call it every now and then.

    Args:
        tells: whether this process tells it, for those of its host.
    """

    def __init__(self, tells: bool) -> None:
        self._launchers = launchers()
        self._tells = tells

    def __call__(self) -> None:
        dead = [launcher for launcher in self._launchers if not launcher.lives()]
        if dead:
            self._launchers = []
            if self._tells:
                print(f"fasttrain: {dead[0].name} (pid {dead[0].pid}), which started this run, has died: stopping it", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def _ancestors() -> Iterator[tuple[Ancestor, list[str]]]:
    """Each process above this one with its command line, the nearest first."""
    pid = os.getppid()
    while pid > 1 and (state := _stat(pid)) is not None:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:
            return
        yield Ancestor(pid, state[19], PurePath(command[0].split(" ")[0]).name), command
        pid = int(state[1])


def _stat(pid: int) -> list[str] | None:
    """proc(5)'s fields of a process from the third on: its state, its parent ..., the twentieth of these when it began."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _is_plain_shell(command: Sequence[str]) -> bool:
    """A shell that was started for one command; a login or interactive shell is none."""
    name = PurePath(command[0]).name if command else ""
    return name in SHELLS and len(command) > 2 and command[1].startswith("-") and command[1].endswith("c")


def _is_session(command: Sequence[str]) -> bool:
    """An ssh daemon's process for one connection, which ends with its client's."""
    return bool(command) and (command[0].startswith("sshd:") or PurePath(command[0].split(":")[0]).name == "sshd-session")
