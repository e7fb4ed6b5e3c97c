"""Proof with a GPU, in stages: tests, kernels and the training step, each within its limit, each leaving its JSON under one folder.

    python -m benchmarks.gpu tests|kernels|step|parity|digest|full [--out build/gpu]

A short loan of a GPU should never be wasted: a stage ends itself before its limit with what it has, is stopped from outside if it
hangs, and the next one runs whatever became of it. `digest` is the most telling part of each in ten minutes together, the most telling
first. Without a GPU every part is reported as not run, and the exit status is 0: nothing failed, and nothing is claimed.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment
from benchmarks.stage import NO_DEVICE
from benchmarks.whole_file import write_json

GRACE = 15.0
"""Seconds that a stage gets beyond its limit before it is killed."""
STOPPED = "stopped at its limit"

Command = list[str]


@dataclass(frozen=True)
class Part:
    """One stage: commands that share a limit. Each gets the seconds that are left, and the folder for its results."""

    name: str
    seconds: float
    commands: Callable[[Path, float], list[Command]]
    needs: tuple[str, ...] = ()


def _module(name: str, *options: str) -> Callable[[Path, float], list[Command]]:
    return lambda out, seconds: [[sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), "--seconds", f"{seconds:.0f}", *options]]


def _pytest(part: str, *options: str) -> Callable[[Path, float], list[Command]]:
    """The tests of one part, which need nothing but torch, Triton and pytest where they are the kernels'."""

    def commands(out: Path, seconds: float) -> list[Command]:
        record = ["-p", "benchmarks.recorder", "--record", str(out / "tests.json"), "--record-part", part]
        limit = ["--record-seconds", f"{seconds:.0f}"]
        robust = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        return [[sys.executable, "-m", "pytest", "-q", "--tb=short", *robust, *record, *limit, *options]]

    return commands


KERNEL_TESTS = ("tests/kernels", "--confcutdir=tests/kernels")
ONLY_ON_A_GPU = Part("tests-gpu", 240, _pytest("gpu", *KERNEL_TESTS, "-m", "gpu"))
"""Determinism, CUDA graphs, more than 2^31 elements: what nothing but a GPU can show."""
PARALLEL = ("-n", "6") if importlib.util.find_spec("xdist") else ()
NATIVE = Part(
    "tests-native", 280, _pytest("native", *KERNEL_TESTS, "-m", "not gpu", *PARALLEL, "--ignore=tests/kernels/test_ahead_of_time.py")
)
"""The same tests that run in the interpreter elsewhere; most of their time goes into compiling kernels, on the processor's cores."""
TRAINING = Part("tests-training", 240, _pytest("training", "tests", "--ignore=tests/kernels", "-m", "gpu"), needs=("deepspeed", "pydantic"))
KERNELS = Part("kernels", 520, _module("kernels"))
STEP = Part("step", 520, _module("train_step"), needs=("pydantic",))
PARITY = Part("parity", 300, _module("parity"), needs=("pydantic", "sklearn"))

PLANS: dict[str, tuple[Part, ...]] = {
    "tests": (ONLY_ON_A_GPU, NATIVE),
    "kernels": (KERNELS,),
    "step": (STEP,),
    "parity": (PARITY,),
    "digest": (
        Part("step", 255, _module("train_step", "--digest"), needs=("pydantic",)),
        Part("kernels", 130, _module("kernels", "--digest")),
        Part("tests-gpu", 60, ONLY_ON_A_GPU.commands),
        Part("tests-native", 70, NATIVE.commands),
    ),
    "full": (
        Part("step", 3000, _module("train_step", "--full"), needs=("pydantic",)),
        Part("kernels", 3000, _module("kernels")),
        ONLY_ON_A_GPU,
        Part("tests-native", 1200, NATIVE.commands),
        TRAINING,
        PARITY,
    ),
}


def run_part(part: Part, out: Path) -> dict[str, Any]:
    """Runs one part and says how it ended; its output goes to the terminal and to log.txt."""
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if not torch.cuda.is_available():
        return {"not_run": NO_DEVICE}
    if missing:
        return {"not_run": f"{', '.join(missing)} not installed"}
    begin = time.monotonic()
    statuses = [run_command(command, part.seconds + GRACE, out) for command in part.commands(out, part.seconds)]
    ended = STOPPED if None in statuses else "passed" if not any(statuses) else f"failed with status {max(filter(None, statuses))}"
    return {"ended": ended, "seconds": round(time.monotonic() - begin, 1)}


def run_command(command: Command, seconds: float, out: Path) -> int | None:
    """The exit status; None if it had to be stopped. A stage's children are stopped with it."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with (out / "log.txt").open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def end_when_told() -> None:
    """Lets SIGTERM end this process by an exception, and so the stage under way with it: one left behind would hold the GPU."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def line(name: str, outcome: dict[str, Any]) -> str:
    """What is told of a part."""
    return f"{name}: not run ({outcome['not_run']})" if "not_run" in outcome else f"{name}: {outcome['ended']} in {outcome['seconds']} s"


def main(arguments: list[str] | None = None) -> int:
    """Runs a plan. The exit status is 1 when a part failed, and 0 when all that could run did well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    args = parser.parse_args(arguments)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    summary: dict[str, Any] = {"benchmark": "gpu", "plan": args.plan, "environment": environment(device), "parts": {}}
    for part in PLANS[args.plan]:
        summary["parts"][part.name] = outcome = run_part(part, out)
        write_json(out / "summary.json", summary)
        print(line(part.name, outcome), flush=True)
    print(f"results: {out}")
    return int(any(outcome.get("ended", "").startswith("failed") for outcome in summary["parts"].values()))


if __name__ == "__main__":
    end_when_told()
    raise SystemExit(main())
