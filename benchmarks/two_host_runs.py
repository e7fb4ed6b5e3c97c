"""One training on two hosts through DeepSpeed's launcher over ssh, supervised; watched from outside, process by process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
import yaml

from benchmarks.environment import ROOT
from benchmarks.hosts import Host
from fasttrain.checkpoint import Manifest, read_weights
from fasttrain.supervisor import is_training

STEPS, SAVE_EVERY, GLOBAL_BATCH = 160, 20, 32
# pdsh and ssh forward next to nothing: what every rank needs is in this file, which `deepspeed` reads where it is started.
FORWARDED = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
LOOK = 0.02  # seconds between two looks at the processes


class GaveUpError(Exception):
    """A run did not get where it had to get in time; the text has its output."""


def config(run_dir: Path, shards: Path, timeout: float) -> dict[str, Any]:
    """A small ViT on the digits under ZeRO-2, in fp32."""
    return {
        "run_dir": str(run_dir),
        "data": {"train": str(shards)},
        "model": {"name": "vit", "depth": 2, "width": 64, "heads": 2, "patch": 2},
        "optimizer": {"learning_rate": 1e-3, "ema": [{"half_life": 500}]},
        "training": {"steps": STEPS, "global_batch": GLOBAL_BATCH, "precision": "fp32", "timeout_seconds": timeout},
        "checkpoint": {"every": SAVE_EVERY},
        "log": {"every": 1, "tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }


@dataclass
class Seen:
    """What was seen of the processes that ran when a fault came.

    Attributes:
        ranks: each rank's process.
        others: launchers, pdsh, ssh and sessions of sshd on both hosts.
        starts, faults: restarts, and folders of stacks, of before: a busy machine may have cost a start.
        ended: seconds from the fault to each process's end.
    """

    fault_at: float
    ranks: dict[int, psutil.Process]
    others: set[psutil.Process]
    starts: int
    faults: set[Path]
    ended: dict[psutil.Process, float] = field(default_factory=dict)

    def look(self) -> None:
        """Notes who has ended since the last look."""
        now = time.monotonic() - self.fault_at
        for process in {*self.ranks.values(), *self.others} - self.ended.keys():
            if not running(process):
                self.ended[process] = now

    def replaced(self, hosts: tuple[Host, Host]) -> bool:
        """Whether a rank of the next start runs."""
        now = {process for host in hosts for process in host.processes()}
        return any(is_training(_words(process)) for process in now - {*self.ranks.values(), *self.others})

    def ranks_left(self) -> list[int]:
        return [rank for rank, process in self.ranks.items() if process not in self.ended]

    def left(self) -> list[psutil.Process]:
        return [process for process in {*self.ranks.values(), *self.others} if process not in self.ended]


class SupervisedRun:
    """`fasttrain supervise -- deepspeed --hostfile ... --module fasttrain train CONFIG`, started on the first host."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path, shards: Path, timeout: float):
        self.hosts, self.folder = hosts, folder
        self.run_dir = folder / "run"
        folder.mkdir(parents=True)
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config(self.run_dir, shards, timeout)))
        (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in FORWARDED.items()))
        self._own = {process for host in hosts for process in host.processes()}  # the two sshds
        self._log: TextIO = (folder / "output.txt").open("w")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(self.hosts[0].hostfile)]
        launcher += ["--launcher", "pdsh", "--master_addr", self.hosts[0].address]
        training = ["--module", "fasttrain", "train", str(self.config)]
        command = [sys.executable, "-m", "fasttrain", "supervise", "--grace", "40", "--", *launcher, *training]
        environment = {**FORWARDED, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        return self.hosts[0].start(command, environment, cwd=self.folder, stdout=self._log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def records(self) -> list[dict[str, Any]]:
        """The run's metrics so far."""
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []

    def step(self) -> int:
        return max((record["step"] for record in self.records()), default=0)

    def wait_for(self, what: Callable[[], bool], seconds: float, told: str) -> float:
        """Seconds until something is so."""
        began = time.monotonic()
        while not what():
            if self.process.poll() is not None and not what():
                raise GaveUpError(f"{told}: the run ended with {self.process.returncode} before:\n{self.output()}")
            if time.monotonic() - began > seconds:
                raise GaveUpError(f"{told}: not within {seconds:.0f} s:\n{self.output()}")
            time.sleep(LOOK)
        return time.monotonic() - began

    def wait(self, seconds: float) -> int:
        """The status that the supervisor ends with."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise GaveUpError(f"not done within {seconds:.0f} s:\n{self.output()}") from None

    def seen(self) -> Seen:
        """The processes of the start under way, as the fault comes now."""
        ranks = {number: rank for number, host in enumerate(self.hosts) for rank in self._running(host) if is_training(_words(rank))}
        others = {process for host in self.hosts for process in self._running(host)} - {*ranks.values()}
        return Seen(time.monotonic(), ranks, others, self.restarts(), self._faults())

    def runner(self) -> psutil.Process:
        """`deepspeed` itself, which started pdsh."""
        return next(child for child in self._supervisor().children() if "deepspeed" in " ".join(_words(child)))

    def restarts(self) -> int:
        return len(re.findall(r"^fasttrain supervise: .*; starting again", self.output(), re.MULTILINE))

    def verdicts(self, seen: Seen) -> list[dict[str, Any]]:
        """What the ranks concluded since the fault."""
        paths = [path for folder in sorted(self._faults() - seen.faults) for path in sorted(folder.glob("verdict-*.json"))]
        return [json.loads(path.read_text()) for path in paths]

    def stacks(self, seen: Seen) -> list[str]:
        """The files of stacks that ranks wrote since the fault."""
        paths = [path for folder in sorted(self._faults() - seen.faults) for path in sorted(folder.glob("rank-*.txt"))]
        return [str(path.relative_to(self.run_dir)) for path in paths]

    def left_over(self) -> list[str]:
        """What still runs on the two hosts, beside what was there before."""
        return [" ".join(_words(p))[:120] for host in self.hosts for p in host.processes() if p not in self._own and running(p)]

    def close(self) -> None:
        """Ends everything of this run, on both hosts."""
        for host in self.hosts:
            for process in set(host.processes()) - self._own:
                if running(process):
                    process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._log.close()
        shutil.rmtree(self.run_dir / "checkpoints", ignore_errors=True)

    def _faults(self) -> set[Path]:
        return set((self.run_dir / "faults").glob("*"))

    def _supervisor(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def _running(self, host: Host) -> list[psutil.Process]:
        return [p for p in host.processes() if p not in self._own and p.pid != self.process.pid and running(p)]


def running(process: psutil.Process) -> bool:
    """Whether it has not ended; a zombie has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def words(process: psutil.Process) -> str:
    """Its command line, for people."""
    return " ".join(_words(process)) or "(ended)"


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def final_state(run_dir: Path) -> dict[str, Mapping[str, torch.Tensor]]:
    """Weights, moments and averages of the last step's checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    manifest = Manifest.read(folder)
    return {key: read_weights(folder, manifest, key) for key in manifest.states}


def same_bits(one: Mapping[str, Mapping[str, torch.Tensor]], other: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    """Whether two states are the same, bit for bit."""
    if one.keys() != other.keys() or any(one[key].keys() != other[key].keys() for key in one):
        return False
    return all(torch.equal(tensor, other[key][name]) for key, tensors in one.items() for name, tensor in tensors.items())
