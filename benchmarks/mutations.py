"""Mutated configs and mutated checkpoints: each is accepted, passed over or refused in one clear message; nothing else may happen.

    python -m benchmarks.mutations configs --count 10000 --seed 0
    python -m benchmarks.mutations checkpoints --count 1000 --seed 0

Every mutant is a function of (seed, number). A fault is any exception but UserError, more than two CPU seconds, 3 GiB of memory, a lost
process, a program executed, a socket opened, an unpickled name, or a file changed outside the trial's own folder.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoint_trials import checkpoint_trial, make_runs
from benchmarks.config_mutants import read_bases
from benchmarks.environment import ROOT, environment
from benchmarks.start_checks import config_trial
from benchmarks.trials import FAULT, Limits, Trial, Verdict, run_trials
from benchmarks.whole_file import write_json
from fasttrain.data.prepare.digits import prepare_digits
from tests.shards import write_random

RESULT = ROOT / "benchmarks" / "results" / "cpu" / "mutations.json"


def small_bases(folder: Path) -> list[dict[str, Any]]:
    """The repository's configs over small sets that each can train on."""
    prepare_digits(folder / "digits")
    latents = write_random(folder / "latents", "latent", (2, 2, 4, 4, 4), 3)
    images = write_random(folder / "images", "image", (3, 8, 8), 3)
    bases = read_bases(ROOT / "configs")
    for raw in bases:
        kind = raw["data"]["train"]
        raw["data"]["train"] = str(latents if "latents" in kind else folder / "digits" if "digits" in kind else images)
        raw["data"]["held_out"] = 2
        raw["run_dir"] = "run"
    return bases


def config_trials(folder: Path, seed: int) -> Trial:
    """The trial of each mutated config."""
    return partial(config_trial, seed=seed, bases=small_bases(folder), source=ROOT)


def checkpoint_trials(folder: Path, seed: int) -> Trial:
    """The trial of each mutated checkpoint."""
    return partial(checkpoint_trial, seed=seed, runs=make_runs(folder))


def main() -> None:
    """Runs the trials, prints the table and the faults, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("configs", "checkpoints"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long; what was not tried is told")
    parser.add_argument("--faults", type=int, default=10, help="how many faults to print in full")
    args = parser.parse_args()
    make = {"configs": config_trials, "checkpoints": checkpoint_trials}[args.kind]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trial = make(Path(folder), args.seed)
        verdicts = _within(60 * args.minutes, run_trials(trial, args.count, args.workers, Limits()), args.faults)
    result = summary(verdicts, args.count)
    _print(args.kind, result)
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    settings = {"count": args.count, "seed": args.seed, "seconds": round(time.monotonic() - began, 1)}
    write_json(RESULT, {**before, args.kind: {"environment": _environment(), "settings": settings, **result}})
    if result["faults"]:
        raise SystemExit(1)


def summary(verdicts: list[Verdict], count: int) -> dict[str, Any]:
    """Counts by outcome, and the slowest trial."""
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    return {
        "tried": len(verdicts),
        "not_tried": count - len(verdicts),
        "outcomes": dict(sorted(outcomes.items())),
        "faults": outcomes[FAULT],
        "most_cpu_seconds": round(max((verdict.seconds for verdict in verdicts), default=0.0), 2),
    }


def _within(seconds: float, verdicts: Iterable[Verdict], most: int) -> list[Verdict]:
    """The verdicts of so many seconds; the first faults are printed as they come."""
    deadline, found = time.monotonic() + seconds, list[Verdict]()
    for verdict in verdicts:
        found.append(verdict)
        if verdict.outcome == FAULT and most > 0:
            most -= 1
            print(f"fault {verdict.number}:\n{verdict.told}", flush=True)
        if len(found) % 1000 == 0:
            print(f"{len(found)} tried", flush=True)
        if time.monotonic() > deadline:
            break
    return found


def _environment() -> dict[str, Any]:
    import torch

    return environment(torch.device("cpu"))


def _print(kind: str, result: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table("outcome", "mutants", title=f"{result['tried']} mutated {kind}, {result['not_tried']} not tried")
    for outcome, count in result["outcomes"].items():
        table.add_row(outcome, str(count))
    console.print(table, f"longest: {result['most_cpu_seconds']} s of CPU time")


if __name__ == "__main__":
    main()
