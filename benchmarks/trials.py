"""Many small trials in processes of their own: bounded in time and memory, and watched for what they execute, write and delete.

A trial is a function of its number and an empty folder; number -1 comes first in each process, unjudged, for what is done once. What it
returns is its outcome; an exception that leaves it, a limit passed, a process lost or a forbidden act is a fault.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

FAULT, WARMING = "fault", -1
# Wall-clock seconds without a word after which a worker is taken for lost: a busy machine may be slow.
SILENCE = 120.0
_EXECUTE = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "socket.connect")
_CHANGE = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


class Verdict(NamedTuple):
    """What became of a trial: its number, outcome, what was told, and the CPU seconds it took."""

    number: int
    outcome: str
    told: str
    seconds: float


class Limits(NamedTuple):
    """Of one trial: CPU seconds, and bytes of memory beyond what the process has at its start."""

    seconds: float = 2.0
    memory: int = 3 << 30


Trial = Callable[[int, Path], tuple[str, str]]


def run_trials(trial: Trial, count: int, workers: int, limits: Limits) -> Iterator[Verdict]:
    """The verdicts of trials 0 .. count - 1, in the order in which they end. `trial` must be picklable."""
    server = multiprocessing.get_context("forkserver")
    streams: dict[Connection, _Stream] = {}

    def start(first: int) -> None:
        if first < count:
            here, there = server.Pipe(duplex=False)
            process = server.Process(target=_work, args=(trial, range(first, count, workers), limits, there))
            process.start()
            there.close()
            streams[here] = _Stream(process, first)

    try:
        for first in range(min(workers, count)):
            start(first)
        yield from _verdicts(streams, start, count, workers)
    finally:  # also where nobody asks for more
        for stream in streams.values():
            stream.process.kill()


def _verdicts(streams: dict[Connection, "_Stream"], start: Callable[[int], None], count: int, workers: int) -> Iterator[Verdict]:
    """What the workers say; one that is lost or silent is replaced from the trial after the one it was at."""
    while streams:
        ready = wait(list(streams), timeout=SILENCE)
        for connection in ready or list(streams):
            stream = streams[connection]  # type: ignore[index]
            verdict = _next(connection) if ready else None  # type: ignore[arg-type]
            if verdict is not None:
                stream.number = verdict.number + workers
                yield verdict
                continue
            del streams[connection]  # type: ignore[arg-type]
            stream.process.kill()
            stream.process.join()
            if stream.number < count:
                why = f"ended with {stream.process.exitcode}" if ready else f"silent for {SILENCE:g} s"
                yield Verdict(stream.number, FAULT, f"the process {why}", SILENCE)
                start(stream.number + workers)


class _Stream:
    """A worker and the trial it is at."""

    def __init__(self, process: Any, number: int):
        self.process, self.number = process, number


def _next(connection: Connection) -> Verdict | None:
    try:
        return Verdict(*connection.recv())
    except EOFError:
        return None


def _work(trial: Trial, numbers: range, limits: Limits, results: Connection) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        watch = _Watch(Path(scratch))
        signal.signal(signal.SIGPROF, _too_slow)
        for number in (WARMING, *numbers):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            os.chdir(folder)
            if number == WARMING:
                trial(number, folder)
            else:
                results.send(tuple(_judge(trial, number, folder, limits, watch)))
            os.chdir(scratch)
            shutil.rmtree(folder)
            if number == WARMING:
                _limit_memory(limits.memory)


def _judge(trial: Trial, number: int, folder: Path, limits: Limits, watch: "_Watch") -> Verdict:
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 5 * limits.seconds)
    watch.acts.clear()
    watch.armed = True
    try:
        outcome, told = trial(number, folder)
    except BaseException as error:
        outcome, told = FAULT, "".join(traceback.format_exception(error)[-6:])
    watch.armed = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - began
    if watch.acts:
        outcome, told = FAULT, f"did {watch.acts[:5]}"
    elif seconds > limits.seconds and outcome != FAULT:
        outcome, told = FAULT, f"took {seconds:.1f} s of CPU time: {told}"
    return Verdict(number, outcome, told[-2000:], seconds)


class _Watch:
    """Notes, while armed, everything that executes a program, connects, unpickles, or changes a file outside the scratch folder."""

    def __init__(self, scratch: Path):
        self.armed, self.acts, self._scratch = False, list[str](), str(scratch)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if (
            event in _EXECUTE
            or (event in _CHANGE and self._outside(args["link" in event]))
            or (event == "open" and self._writes_outside(args))
        ):
            self.acts.append(f"{event} {args[:2]!r}"[:200])

    def _writes_outside(self, args: tuple[Any, ...]) -> bool:
        path, _, flags = args
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and self._outside(path)

    def _outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a descriptor: its opening was seen
        return not os.path.realpath(os.fsdecode(path)).startswith((self._scratch, "/dev/null"))


def _limit_memory(extra: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, resource.RLIM_INFINITY))


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("stuck: five times the CPU time that a trial may take")
