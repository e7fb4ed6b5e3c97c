"""What happens to runs, done to small ones: every fault leaves weights, moments and averages bit-identical to the uninterrupted run's.

    python -m benchmarks.faults [--kills 100] [--minutes 12] [--seed N] [--only kills|stops|interrupts|disk|clock ...]

Two real ranks on this machine. Without --only it makes all but `stops`, whose 50 real launches take some nine minutes by themselves.
What time does not allow is left out, and the table says how many there were. Results: benchmarks/results/cpu/faults.json, where the
figures of what was not run this time stay as they were.
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import kill_trials, machine_trials, stop_trials, tables
from benchmarks.environment import environment, results_folder
from benchmarks.fault_runs import Outcome, Setting
from benchmarks.fault_tables import faults_rows, kills_rows
from benchmarks.whole_file import write_json
from fasttrain.cli import main as fasttrain

RESULT = results_folder(torch.device("cpu")) / "faults.json"
TRIALS: dict[str, Callable[[Setting], list[Outcome]]] = {
    "interrupts": lambda setting: [stop_trials.sigint_twice(setting)],
    "disk": machine_trials.disk,
    "clock": lambda setting: [machine_trials.clock(setting)],
    "kills": lambda setting: [kill_trials.kills(setting)],
    "stops": lambda setting: [stop_trials.sigterm(setting)],
}
COUNTS = {"interrupts": 12, "stops": 50}


def main() -> int:
    """Makes the trials, prints the tables and writes the result. The exit status is 1 where something was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="over ZeRO 1, 2 and 3 together")
    parser.add_argument("--minutes", type=float, default=12, help="after which no new trial is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=[name for name in TRIALS if name != "stops"])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * args.minutes
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "digits"
        if fasttrain(["prepare", "digits", str(shards)]):
            return 1
        for name in args.only:
            setting = Setting(Path(scratch) / name, shards, args.seed, deadline, COUNTS.get(name, args.kills))
            found[name] = measured(attempted(name, setting), args.seed)
    before = json.loads(args.out.read_text())["trials"] if args.out.exists() else {}
    result = {"benchmark": "faults", "trials": {**before, **found}}
    write_json(args.out, result)
    show(result)
    return int(any(outcome["problems"] for each in found.values() for outcome in each["outcomes"]))


def attempted(name: str, setting: Setting) -> list[Outcome]:
    """The outcomes of one kind of trial; one that breaks is an outcome too, and does not take the others with it."""
    try:
        return TRIALS[name](setting)
    except Exception:
        return [Outcome(name, problems=[f"the trial itself broke:\n{traceback.format_exc()}"])]


def measured(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    """Outcomes as plain data, with what they depend on."""
    for problem in (problem for outcome in outcomes for problem in outcome.problems):
        print(problem)
    return {"environment": environment(torch.device("cpu")), "seed": seed, "outcomes": [outcome.plain() for outcome in outcomes]}


def show(result: dict[str, Any]) -> None:
    """The tables on the screen."""
    for head, rows in (made for made in (kills_rows(result), faults_rows(result)) if made[1]):
        tables.show(head, rows)


if __name__ == "__main__":
    raise SystemExit(main())
