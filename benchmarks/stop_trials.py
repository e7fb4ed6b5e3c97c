"""Stops at random moments: SIGTERM through DeepSpeed's real launcher, and two Ctrl-C in a row.

Nothing but the stops saves in these runs, so that a step which a stop does not save is a step lost.
"""

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from benchmarks.environment import ROOT
from benchmarks.fault_runs import LIMIT, RANKS, Outcome, Setting, Whole, newest_step, outputs, spread, uninterrupted, write_config
from benchmarks.forked_ranks import Start, free_port
from fasttrain.lines import records

GONE_WITHIN = 30.0
STEPS_A_STOP = 12
NEVER = 10**6


class Launch:
    """`fasttrain train CONFIG` on RANKS ranks, started by `deepspeed.launcher.launch`, which is what gets a node's SIGTERM."""

    def __init__(self, config: Path, out: Path):
        world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(RANKS))}).encode()).decode()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out = out
        self._file: IO[bytes] = out.open("wb")
        launcher = ["-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "--module", "fasttrain", "train", str(config)],
            env=environment(),
            stdout=self._file,
            stderr=self._file,
            start_new_session=True,
        )
        self.all: list[psutil.Process] = []

    def wait_for_step(self, run_dir: Path, step: int) -> bool:
        """Whether a record of this step, or a later one, came to be."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and self.process.poll() is None:
            if last_step(run_dir) >= step:
                return True
            time.sleep(0.01)
        return False

    def stop(self) -> float:
        """SIGTERM to the launcher; the seconds until all its processes are gone."""
        parent = psutil.Process(self.process.pid)
        family = [parent, *parent.children(recursive=True)]
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.wait(LIMIT)
        _, left = psutil.wait_procs(family, timeout=LIMIT)
        return LIMIT if left else time.monotonic() - began

    def wait(self, seconds: float) -> int:
        """The launcher's status; after so many seconds everything is killed."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            status = self.process.wait()
        self._file.close()
        return status

    def told(self) -> str:
        return self.out.read_text(errors="replace")


def environment(**more: str) -> dict[str, str]:
    """The environment of a process started anew, which is not a rank of anything."""
    found = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    source = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**found, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": source, **more}


def last_step(run_dir: Path) -> int:
    """The last step with a record."""
    return max((record["step"] for record in records(run_dir / "metrics.jsonl")), default=0)


@dataclass
class Stop:
    """One stop: the last step with a record, the step saved, the seconds until all was gone."""

    recorded: int
    saved: int
    seconds: float

    def problem(self) -> str | None:
        if self.saved != self.recorded:
            return f"stopped after step {self.recorded}, saved was {self.saved}"
        return f"gone after {self.seconds:.1f} s" if self.seconds >= GONE_WITHIN else None


def sigterm(setting: Setting) -> Outcome:
    """SIGTERM to the launcher at random moments: the step under way is finished, saved, and all is gone before a launcher kills."""
    steps = (setting.trials + 1) * STEPS_A_STOP
    folder = setting.folder / "sigterm"
    whole = uninterrupted(folder / "whole", write_config(folder / "whole", setting.shards, 2, steps, every=NEVER))
    config = write_config(folder / "run", setting.shards, 2, steps, every=NEVER)
    chance, found, problems = random.Random(setting.seed), list[Stop](), list[str]()
    for number in range(setting.trials):
        if setting.late():
            break
        launch = Launch(config, outputs(folder / "run", number) / "launch.txt")
        came = launch.wait_for_step(folder / "run", number * STEPS_A_STOP + chance.randint(1, STEPS_A_STOP))
        time.sleep(chance.random() * 2 * whole.step_seconds)
        seconds = launch.stop()
        if not came:
            return Outcome("SIGTERM to the launcher", len(found), 0, [*problems, f"start {number}: {launch.told()}"])
        found.append(Stop(last_step(folder / "run"), newest_step(folder / "run"), seconds))
        if (number + 1) % 5 == 0:
            setting.say(f"SIGTERM: {number + 1} stops, {sum(stop.problem() is not None for stop in found)} not as promised")
    problems += [f"stop {i}: {problem}" for i, stop in enumerate(found) if (problem := stop.problem())]
    problems += finish(config, folder / "run", whole)
    figures = {"gone_seconds": spread([stop.seconds for stop in found]), "steps_lost": sum(stop.recorded - stop.saved for stop in found)}
    return Outcome("SIGTERM to the launcher", len(found), sum(stop.problem() is None for stop in found), problems, figures)


def finish(config: Path, run_dir: Path, whole: Whole) -> list[str]:
    """Runs on to the end; where it differs from the uninterrupted run."""
    start = Start(config, RANKS, outputs(run_dir, 999))
    ended = start.wait(5 * LIMIT)
    return [f"the last start ended with {ended.statuses}:\n{start.told()}"] if any(ended.statuses) else whole.differences(run_dir)


def sigint_twice(setting: Setting) -> Outcome:
    """Ctrl-C, and once more at once, as a terminal sends it: to every process. It ends at once, and nothing that was saved is touched."""
    steps = (setting.trials + 1) * STEPS_A_STOP
    folder = setting.folder / "sigint"
    whole = uninterrupted(folder / "whole", write_config(folder / "whole", setting.shards, 1, steps))
    config = write_config(folder / "run", setting.shards, 1, steps)
    chance, problems, seconds = random.Random(setting.seed), list[str](), list[float]()
    newest = 0
    for number in range(setting.trials):
        start = Start(config, RANKS, outputs(folder / "run", number))
        step = number * STEPS_A_STOP + chance.randint(1, STEPS_A_STOP)
        came = start.watch(lambda s=start, n=step: any(m.what == "forward" and m.step >= n for m in s.ranks[0].moments[-4:]), LIMIT)
        time.sleep(chance.random() * whole.step_seconds)
        problem, gone = _interrupt(start, chance.random() * whole.step_seconds)
        first = start.ranks[0].first_step()
        if not came or problem or first is None or first - 1 < newest:
            problems.append(f"start {number} from step {first}, {newest} was saved; {problem}\n{start.told()}")
        newest = newest_step(folder / "run")
        seconds.append(gone)
    kept = setting.trials - len(problems)
    setting.say(f"SIGINT twice: {setting.trials} trials, {len(problems)} not as promised")
    return Outcome(
        "SIGINT twice", setting.trials, kept, problems + finish(config, folder / "run", whole), {"gone_seconds": spread(seconds)}
    )


def _interrupt(start: Start, pause: float) -> tuple[str | None, float]:
    """Ctrl-C to all ranks, and again after a pause; what was wrong, and how long they took to go."""
    for wait in (pause, 0.0):
        for rank in start.ranks:
            if rank.process.exitcode is None:
                os.kill(rank.pid, signal.SIGINT)
        at = time.monotonic()
        time.sleep(wait)
    ended = start.wait(LIMIT)
    seconds = max(ended.at) - at
    fine = all(status in (128 + signal.SIGINT, -signal.SIGINT) for status in ended.statuses)
    return None if fine and seconds < 5 else f"ended with {ended.statuses} after {seconds:.1f} s", seconds
