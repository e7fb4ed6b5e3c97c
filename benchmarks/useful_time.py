"""Useful time: the share of a run's hours that its final weights are made of, when a rank is killed every 100 steps and every 10 are saved.

    python -m benchmarks.useful_time [--steps N] [--kill-every N] [--batch N] [--protocol after-save|uniform ...] [--launcher deepspeed]

A run on two ranks under `fasttrain supervise -- deepspeed ...`, with SIGKILL to a random rank: in the step after a save (`after-save`), or
in a step drawn uniformly from each stretch (`uniform`: half of what lies between two saves is done again on average).

    useful = steps x the median time of a step / time from the beginning of the first step to the end of the command

What is not useful is told in parts: noticing, the launcher's end, the launcher's start, the ranks' start and load, steps done again.
"""

import argparse
import itertools
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import torch
import yaml

from benchmarks import tables
from benchmarks.environment import environment, results_folder
from benchmarks.fault_runs import RANKS
from benchmarks.fault_tables import useful_rows
from benchmarks.forked_ranks import free_port
from benchmarks.stop_trials import environment as started_anew
from benchmarks.whole_file import write_json
from fasttrain.cli import main as fasttrain
from fasttrain.supervisor import trainings
from tests.runs import plain_config, zero

RESULT = results_folder(torch.device("cpu")) / "useful_time.json"
EVERY = 10
PROTOCOLS = ("after-save", "uniform")
LAUNCHERS = {"deepspeed": [f"--num_accelerators={RANKS}"], "torchrun": [f"--nproc_per_node={RANKS}"]}
STEP = re.compile(r"step (\d+)/\d+: ")
CONTINUING = re.compile(r"continuing from step-(\d+)")
PATIENCE = 120.0
TARGET = 0.97
PARTS = ("noticing", "ending", "launching", "starting")


@dataclass
class Line:
    """A line that the run printed, and when it was read (time.monotonic)."""

    at: float
    text: str

    @property
    def step(self) -> int | None:
        found = STEP.search(self.text)
        return int(found[1]) if found else None


@dataclass
class Lost:
    """What one kill cost. `step` was the last one finished; the parts of the pause follow each other, in seconds.

    Attributes:
        begun: how far into the next step it came.
        noticing: until the other ranks were gone. ending: until the launcher was. launching: until there were new ranks.
        starting: until their first step was done, without that step's own time.
    """

    step: int
    resumed: int = 0
    begun: float = 0.0
    noticing: float = 0.0
    ending: float = 0.0
    launching: float = 0.0
    starting: float = 0.0

    @property
    def pause(self) -> float:
        return self.noticing + self.ending + self.launching + self.starting

    @property
    def redone(self) -> int:
        """Finished steps that were computed again."""
        return self.step - self.resumed


@dataclass
class Supervised:
    """A run under `fasttrain supervise`, and everything that it prints, as it comes."""

    process: subprocess.Popen[str]
    lines: list[Line] = field(default_factory=list)
    news: threading.Condition = field(default_factory=threading.Condition)

    @classmethod
    def start(cls, launcher: str, config: Path) -> "Supervised":
        starts = [str(Path(sys.executable).with_name(launcher)), *LAUNCHERS[launcher], f"--master_port={free_port()}"]
        command = [sys.executable, "-m", "fasttrain", "supervise", "--", *starts, "--module", "fasttrain", "train", str(config)]
        run = cls(subprocess.Popen(command, env=started_anew(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        threading.Thread(target=run._read, args=(run.process.stdout,), daemon=True).start()
        return run

    def wait_for(self, pattern: str, seconds: float, since: int = 0) -> Line:
        """The first line from number `since` on that matches.

        Raises:
            RuntimeError: none came.
        """
        deadline = time.monotonic() + seconds
        with self.news:
            while True:
                for line in self.lines[since:]:
                    if re.search(pattern, line.text):
                        return line
                since = len(self.lines)
                if time.monotonic() > deadline or self._over():
                    raise RuntimeError(f"no line with {pattern!r} came:\n" + "\n".join(line.text for line in self.lines[-40:]))
                self.news.wait(1)

    def _over(self) -> bool:
        """Whether it has ended, and everything that it printed is here."""
        return self.process.poll() is not None and not self.news.wait(1)

    def ranks(self) -> list[psutil.Process]:
        """Its processes that train."""
        return list(trainings(psutil.Process(self.process.pid)))

    def _read(self, stream: IO[str]) -> None:
        for text in stream:
            with self.news:
                self.lines.append(Line(time.monotonic(), text.rstrip()))
                self.news.notify_all()


def kill(run: Supervised, step: int, chance: random.Random) -> Lost:
    """Kills a random rank somewhere in the step after this one, and sees the run come back to its next one."""
    run.wait_for(rf"^step {step}/", PATIENCE * 60)
    time.sleep(chance.random() * median_step(run.lines))
    ranks, said = run.ranks(), len(run.lines)
    victim = ranks[chance.randrange(len(ranks))]
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    last = [line for line in run.lines[:said] if line.step is not None][-1]
    psutil.wait_procs([rank for rank in ranks if rank != victim], timeout=PATIENCE)
    noticed = time.monotonic()
    ended = run.wait_for("fasttrain supervise: .*starting again", PATIENCE, said).at
    while len(run.ranks()) < RANKS:
        time.sleep(0.02)
    launched = time.monotonic()
    resumed = run.wait_for(CONTINUING.pattern, PATIENCE, said)
    found = CONTINUING.search(resumed.text)
    first = run.wait_for(STEP.pattern, PATIENCE, run.lines.index(resumed))
    assert found is not None and last.step is not None
    parts = (noticed - killed, ended - noticed, launched - ended, first.at - launched - median_step(run.lines))
    return Lost(last.step, int(found[1]), killed - last.at, *parts)


def measure(protocol: str, launcher: str, config: Path, steps: int, kill_every: int, seed: int) -> dict[str, Any]:
    """One run under kills.

    Raises:
        RuntimeError: it did not come to its end.
    """
    chance, lost = random.Random(seed), list[Lost]()
    run = Supervised.start(launcher, config)
    try:
        first = run.wait_for(r"^step 1/", PATIENCE)
        for before in range(0, steps - kill_every + 1, kill_every):
            at = before + (kill_every - EVERY if protocol == "after-save" else chance.randint(2, kill_every - 2))
            lost.append(kill(run, at, chance))
            print(f"{protocol}, {launcher}: {lost[-1]}", flush=True)
        run.wait_for(rf"^step {steps}/", PATIENCE * 60)
        status = run.process.wait(PATIENCE)
    finally:
        run.process.terminate()  # passed on to the ranks, where there still are any
        run.process.wait(PATIENCE)
    if status:
        raise RuntimeError(f"ended with {status}")
    return {"protocol": protocol, "launcher": launcher, **summary(run.lines, lost, steps, first.at, time.monotonic())}


def summary(lines: Sequence[Line], lost: Sequence[Lost], steps: int, first: float, end: float) -> dict[str, Any]:
    """Useful time and where the rest went. The first step is taken to have lasted a median step."""
    step = median_step(lines)
    wall = end - first + step
    again = sum(each.redone * step + each.begun for each in lost)
    pauses = sum(each.pause for each in lost)
    rest = wall - steps * step - pauses - again
    return {
        "useful": steps * step / wall,
        "steps": steps,
        "kills": len(lost),
        "step_seconds": step,
        "wall_seconds": wall,
        "pause_a_kill": {name: statistics.mean(getattr(each, name) for each in lost) for name in PARTS},
        "steps_redone_a_kill": again / len(lost) / step,
        "slower_steps_saves_and_end_seconds": rest,
        "enough_from_step_seconds": enough_from(pauses / len(lost), again / len(lost) / step, steps / len(lost), rest / (steps * step)),
        "each": [{**asdict(each), "redone": each.redone} for each in lost],
    }


def enough_from(pause: float, redone: float, apart: float, rest: float) -> float | None:
    """The step time s at which useful time reaches the target. None: at no step time.

    apart s / (apart s (1 + rest) + pause + redone s) = TARGET, with `rest` (saves, slower steps, the end) as a share of the steps' time.
    """
    share = apart * (1 / TARGET - 1 - rest) - redone
    return pause / share if share > 0 else None


def median_step(lines: Sequence[Line]) -> float:
    """The median time between two neighbouring steps."""
    told = [line for line in lines if line.step is not None]
    return statistics.median(after.at - line.at for line, after in itertools.pairwise(told) if after.step == (line.step or 0) + 1)


def write_config(folder: Path, shards: Path, steps: int, batch: int) -> Path:
    """A transformer of 64 tokens and 4 M parameters, saved every EVERY steps, each step told."""
    raw = plain_config(
        folder,
        shards,
        deepspeed=zero(2),
        model={"depth": 6, "width": 192, "heads": 3, "patch": 1},
        training={"steps": steps, "global_batch": batch},
        checkpoint={"every": EVERY},
    )
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(raw))
    return path


def show(result: dict[str, Any]) -> None:
    """The table on the screen."""
    head, rows = useful_rows(result)
    tables.show(head, rows)


def main() -> int:
    """Measures, prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kill-every", type=int, default=100)
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--launcher", choices=list(LAUNCHERS), default="deepspeed")
    parser.add_argument("--batch", type=int, default=160, help="images a step: sets the step time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not EVERY < args.kill_every <= args.steps:
        parser.error(f"--kill-every must lie between {EVERY}, the steps between saves, and --steps, so that there is a kill to measure")
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "digits"
        if fasttrain(["prepare", "digits", str(shards)]):
            return 1
        for protocol in args.protocol:
            config = write_config(Path(scratch) / protocol, shards, args.steps, args.batch)
            runs.append(measure(protocol, args.launcher, config, args.steps, args.kill_every, args.seed))
    result = {"benchmark": "useful_time", "environment": environment(torch.device("cpu")), "target": TARGET, "runs": runs}
    write_json(args.out, result)
    show(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
