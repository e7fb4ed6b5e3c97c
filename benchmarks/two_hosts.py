"""A training on two hosts that loses a process, the link or its launcher: noticed when, named whom, left what, and ended how.

    python -m benchmarks.two_hosts [--scenario NAME ...] [--timeout 15] [--out FILE] [--keep FOLDER]

Two hosts on this machine (benchmarks/hosts.py: network namespaces, an sshd each) train a small ViT on digits, one rank each, under ZeRO-2
and in fp32, started by `fasttrain supervise -- deepspeed --hostfile ... --module fasttrain train CONFIG` over pdsh and ssh. Scenarios:

    undisturbed        the run that all others must end as, bit for bit: weights, moments, averages, last loss
    worker killed      SIGKILL to rank 1
    worker stopped     SIGSTOP to rank 1, for good
    link cut           the second host's eth0 down; up again when no rank of the start is left
    launcher killed    SIGKILL to `deepspeed` itself, and to nothing below it

A fault counts as noticed on a rank when its process has ended; the seconds are from the fault on. Allowed are 5 s for a killed rank,
training.timeout_seconds and 5 s for a silent one, and 30 s for the launcher's death, on which the ranks save as at a SIGTERM.
"""

import argparse
import itertools
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.environment import environment, results_folder
from benchmarks.hosts import Host, missing, two_hosts
from benchmarks.two_host_runs import SAVE_EVERY, STEPS, GaveUpError, Seen, SupervisedRun, final_state, same_bits, words
from benchmarks.two_host_table import told
from benchmarks.whole_file import write_json
from fasttrain.data.prepare.digits import prepare_digits

CPU = torch.device("cpu")
RESULT = results_folder(CPU) / "two_hosts.json"
START_SECONDS, REST_SECONDS = 150.0, 240.0
MARGIN = 5.0  # what a notice may take beyond its limit
STOP_SECONDS = 30.0  # what a stop may take, the save included: launchers and schedulers kill then
LOOKS_A_SEARCH = 10
AT_STEP = 50  # between two saves


@dataclass(frozen=True)
class Scenario:
    """One fault.

    Attributes:
        strike: brings it about.
        notice_seconds: within how long every rank is to have ended, given the timeout.
        mend: takes it back once no rank of the start is left.
    """

    strike: Callable[[SupervisedRun, Seen], None]
    notice_seconds: Callable[[float], float]
    mend: Callable[[SupervisedRun], None] = lambda run: None


def _at_once(timeout: float) -> float:
    return MARGIN


def _as_a_stop(timeout: float) -> float:
    return STOP_SECONDS


def _after_timeout(timeout: float) -> float:
    return timeout + MARGIN


FAULTS = {
    "worker killed": Scenario(lambda run, seen: seen.ranks[1].send_signal(signal.SIGKILL), _at_once),
    "worker stopped": Scenario(lambda run, seen: seen.ranks[1].send_signal(signal.SIGSTOP), _after_timeout),
    "link cut": Scenario(lambda run, seen: run.hosts[1].set_link(up=False), _after_timeout, lambda run: run.hosts[1].set_link(up=True)),
    "launcher killed": Scenario(lambda run, seen: run.runner().send_signal(signal.SIGKILL), _as_a_stop),
}
UNDISTURBED = "undisturbed"


class Trials:
    """The scenarios, each beside the undisturbed run."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path, timeout: float, say: Callable[[str], None]):
        self._hosts, self._folder, self._timeout, self._say = hosts, folder, timeout, say
        self._shards = folder / "digits"
        prepare_digits(self._shards)
        self._expected: dict[str, Any] = {}
        self._last_loss = 0.0

    def undisturbed(self) -> dict[str, Any]:
        run = self._start(UNDISTURBED)
        try:
            status = run.wait(START_SECONDS + REST_SECONDS)
            self._expected, self._last_loss = final_state(run.run_dir), run.records()[-1]["loss"]
            steps = [record["images_per_second"] for record in run.records()]
            return {"status": status, "restarts": run.restarts(), "loss": self._last_loss, "images_per_second": statistics.median(steps)}
        finally:
            run.close()

    def fault(self, name: str) -> dict[str, Any]:
        """Brings it about, and watches what comes of it."""
        scenario, run = FAULTS[name], self._start(name.replace(" ", "-"))
        try:
            run.wait_for(lambda: run.step() >= AT_STEP, START_SECONDS, f"step {AT_STEP}")
            seen = run.seen()
            scenario.strike(run, seen)
            self._say(f"{name}: struck at step {run.step()}")
            notice = self._watch(run, seen, scenario)
            self._say(f"{name}: ranks ended after {notice['ranks_ended_seconds']} s, started again after {notice['restarted_seconds']} s")
            status = run.wait(REST_SECONDS)
            return {**notice, **self._outcome(run, seen, status)}
        finally:
            scenario.mend(run)
            run.close()

    def _start(self, name: str) -> SupervisedRun:
        self._say(f"{name}: starting")
        return SupervisedRun(self._hosts, self._folder / name, self._shards, self._timeout)

    def _watch(self, run: SupervisedRun, seen: Seen, scenario: Scenario) -> dict[str, Any]:
        """Until a rank of the next start runs: when each process ended, and which were left by then."""
        allowed, mended, looks = scenario.notice_seconds(self._timeout), False, itertools.count()

        def looked() -> bool:
            nonlocal mended
            seen.look()
            if not mended and not seen.ranks_left():
                scenario.mend(run)
                mended = True
            return next(looks) % LOOKS_A_SEARCH == 0 and seen.replaced(run.hosts)

        restarted = run.wait_for(looked, self._timeout + REST_SECONDS, "noticed and started again")
        left = [words(process)[:100] for process in seen.left()]
        ranks = {str(rank): round(seen.ended[process], 2) for rank, process in seen.ranks.items() if process in seen.ended}
        return {
            "limit_seconds": allowed,
            "ranks_ended_seconds": ranks,
            "restarted_seconds": round(restarted, 2),
            "all_ended_seconds": round(max(seen.ended.values(), default=0.0), 2),
            "left_at_restart": left,
            "in_time": len(ranks) == len(seen.ranks) == 2 and max(ranks.values()) <= allowed,
        }

    def _outcome(self, run: SupervisedRun, seen: Seen, status: int) -> dict[str, Any]:
        """How the run as a whole ended."""
        time.sleep(1.0)  # what ends by itself has ended
        verdicts = run.verdicts(seen)
        finished = status == 0 and run.step() == STEPS
        return {
            "status": status,
            "restarts": run.restarts() - seen.starts,
            "restarts_before": seen.starts,
            "verdicts": [{key: verdict[key] for key in ("cause", "ranks", "told")} for verdict in verdicts],
            "stacks": run.stacks(seen),
            "left_at_end": run.left_over(),
            "finished": finished,
            "same_loss": finished and run.records()[-1]["loss"] == self._last_loss,
            "same_bits": finished and same_bits(final_state(run.run_dir), self._expected),
        }


def main(arguments: list[str] | None = None) -> int:
    """Runs the scenarios; the exit status is 1 where one was not as promised, 2 where two hosts cannot be made here."""
    args = _parser().parse_args(arguments)
    console = Console(highlight=False)
    if lacking := missing():
        console.print(f"not run: {lacking}")
        return 2
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - began:5.0f} s] {line}", markup=False)

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        with two_hosts(folder / "hosts") as hosts:
            result = _run(Trials(hosts, folder, args.timeout, say), args.scenario or list(FAULTS), say)
    result |= {"seconds": round(time.monotonic() - began), "settings": _settings(args.timeout), "environment": environment(CPU)}
    write_json(args.out, result)
    console.print(told(result), markup=False, soft_wrap=True)
    return 0 if all(as_promised(trial) for trial in result["faults"].values()) else 1


def _run(trials: Trials, names: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    result: dict[str, Any] = {UNDISTURBED: trials.undisturbed(), "faults": {}}
    for name in names:
        try:
            result["faults"][name] = trials.fault(name)
        except GaveUpError as error:
            say(f"{name}: {error}")
            result["faults"][name] = {"failed": str(error).splitlines()[0]}
    return result


def as_promised(trial: dict[str, Any]) -> bool:
    """Whether a fault was noticed in time, nothing was left running, and the run ended as if nothing had happened."""
    if "failed" in trial:
        return False
    return trial["in_time"] and not trial["left_at_restart"] and not trial["left_at_end"] and trial["same_bits"] and trial["same_loss"]


def _settings(timeout: float) -> dict[str, Any]:
    pdsh = subprocess.run(["pdsh", "-V"], capture_output=True, text=True).stdout.splitlines()
    return {"steps": STEPS, "save_every": SAVE_EVERY, "struck_at_step": AT_STEP, "timeout_seconds": timeout, "zero": 2, "pdsh": pdsh[0]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", choices=list(FAULTS), help="one of the faults only; may be given again")
    parser.add_argument("--timeout", type=float, default=15.0, help="training.timeout_seconds")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--keep", type=Path, help="a new folder for the runs and their output, instead of one that is removed")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
