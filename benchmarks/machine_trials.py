"""What else a machine does to a run: a disk that is full or not to be written to, for all ranks or for one, and a clock that jumps."""

import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from benchmarks.fault_runs import LIMIT, RANKS, Outcome, Setting, Whole, newest_step, uninterrupted, write_config
from benchmarks.forked_ranks import Start, free_port
from benchmarks.stop_trials import environment, last_step
from fasttrain.files import sync

STEPS = 150
FROM, TO = 20, 60  # the steps between which the disk takes nothing
DAY = 86_400
JUMPS = ("+1d", "-1d", "+1d", "+0", "-1d")
LIBRARY = ("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
Trouble = Callable[[Start, Path], AbstractContextManager[None]]


class NotRun(Exception):
    """Why something cannot be tried on this machine."""


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system in this folder, for as long as the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    tried = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise NotRun(f"needs the right to mount: {tried.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(start: Start, folder: Path) -> Iterator[None]:
    """No room left in the run folder, a file system of its own."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(start: Start, folder: Path) -> Iterator[None]:
    """The folder of checkpoints mounted so that nothing can be written to it."""
    checkpoints = folder / "checkpoints"
    with mounted(checkpoints, "--bind", "-o", "ro", str(checkpoints)):
        yield


def refused(number: int) -> Trouble:
    """One rank may write no file of more than 64 KiB: no share of a checkpoint."""

    @contextmanager
    def trouble(start: Start, folder: Path) -> Iterator[None]:
        pid = start.ranks[number].pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    return trouble


TROUBLES: dict[str, Trouble] = {
    "disk full": full,
    "disk full for rank 0 (file size limit)": refused(0),
    "disk full for rank 1 (file size limit)": refused(1),
    "read-only folder": read_only,
}


def disk(setting: Setting) -> list[Outcome]:
    """Each trouble in a run of its own: training goes on, the checkpoint before stays, and saving goes on when the trouble is over."""
    whole = uninterrupted(setting.folder / "disk", write_config(setting.folder / "disk", setting.shards, 2, STEPS))
    found = []
    for number, (name, trouble) in enumerate(TROUBLES.items()):
        try:
            problems = _troubled(setting.folder / f"disk-{number}", setting, trouble, whole)
            found.append(Outcome(name, 1, int(not problems), problems))
        except NotRun as missing:
            found.append(Outcome(name, not_run=str(missing)))
        setting.say(f"{name}: {found[-1].not_run or found[-1].problems or 'as promised'}")
    return found


def _troubled(folder: Path, setting: Setting, trouble: Trouble, whole: Whole) -> list[str]:
    config = write_config(folder, setting.shards, 2, STEPS, sampling={"every": FROM, "count": 4, "sampler": {"name": "heun", "steps": 2}})
    with mounted(folder, "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        start = Start(config, RANKS, folder / "printed")
        try:
            _reach(start, FROM)
            with trouble(start, folder):
                time.sleep(1)  # what was under way may still be committed
                before = _committed(folder)
                _reach(start, TO)
                problems = [] if _committed(folder) == before else [f"{before} became {_committed(folder)} on a disk that takes nothing"]
            ended = start.wait(LIMIT)
        finally:
            start.kill()
        if any(ended.statuses):
            return [*problems, f"ended with {ended.statuses}:\n{start.told()}"]
        warnings = start.told().count("trying again")
        problems += [] if warnings == 1 else [f"told {warnings} times instead of once:\n{start.told()}"]
        return problems + whole.differences(folder)


def _reach(start: Start, step: int) -> None:
    if not start.watch(lambda: any(moment.step >= step for moment in start.ranks[0].moments[-1:]), LIMIT):
        raise RuntimeError(f"step {step} was not reached:\n{start.told()}")


def _committed(folder: Path) -> tuple[int, str]:
    """The newest checkpoint's step, and where the pointer points."""
    return newest_step(folder), (folder / "checkpoints" / "latest").read_text().strip()


def clock(setting: Setting) -> Outcome:
    """The wall clock jumps by a day, forth and back, while a run goes on; the monotonic clock is left alone, as the kernel leaves it."""
    name = "clock jumps by a day"
    library = next((path for path in LIBRARY if Path(path).exists()), None)
    if library is None:
        return Outcome(name, not_run="needs libfaketime")
    folder = setting.folder / "clock"
    whole = uninterrupted(folder / "whole", write_config(folder / "whole", setting.shards, 1, STEPS))
    config, offset = write_config(folder / "run", setting.shards, 1, STEPS, log={"every": 1, "tensorboard": True}), folder / "offset"
    offset.write_text("+0\n")
    ranks = _ranks_with_clock(config, library, offset, folder)
    try:
        jumped = _jump(offset, folder / "run", ranks)
        statuses = [rank.wait(LIMIT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    problems = [] if not any(statuses) else [f"ended with {statuses}: {(folder / 'rank-0.txt').read_text()}"]
    problems += [] if jumped == len(JUMPS) else [f"only {jumped} of {len(JUMPS)} jumps fell into the run"]
    seen = _jumps_seen(folder / "run")
    problems += [] if seen == jumped else [f"rank 0 saw {seen} of {jumped} jumps: the clock was not what it should have been"]
    problems += whole.differences(folder / "run")
    setting.say(f"{name}: {problems or 'as promised'}")
    return Outcome(name, len(JUMPS), jumped if not problems else 0, problems)


def _ranks_with_clock(config: Path, library: str, offset: Path, folder: Path) -> list[subprocess.Popen[bytes]]:
    faked = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for number in range(RANKS):
        with (folder / f"rank-{number}.txt").open("wb") as out:
            given = environment(**faked, **place, RANK=str(number), LOCAL_RANK=str(number))
            command = [sys.executable, "-m", "fasttrain", "train", str(config)]
            started.append(subprocess.Popen(command, env=given, stdout=out, stderr=out))
    return started


def _jump(offset: Path, run_dir: Path, ranks: list[subprocess.Popen[bytes]]) -> int:
    """Jumps at steps spread over the run; how many came before its end."""
    for number, jump in enumerate(JUMPS):
        deadline = time.monotonic() + LIMIT
        while last_step(run_dir) < (number + 1) * STEPS // (len(JUMPS) + 1):
            if ranks[0].poll() is not None or time.monotonic() > deadline:
                return number
            time.sleep(0.01)
        draft = offset.with_suffix(".new")
        draft.write_text(f"{jump}\n")
        sync(draft)
        os.replace(draft, offset)
    return len(JUMPS)


def _jumps_seen(run_dir: Path) -> int:
    """How often the wall clock leapt between two records that the run itself stamped with it: TensorBoard's."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    times = [event.wall_time for path in sorted(run_dir.glob("**/*tfevents*")) for event in EventFileLoader(str(path)).Load()]
    return sum(abs(after - before) > DAY / 2 for before, after in itertools.pairwise(times))
