"""Numerical faults planted by the score: whether each is skipped, found or named, and whether anything is that should not be.

    python -m benchmarks.numerical_faults [--parts skips flips stragglers spikes]

skips: a loss or gradient that is not finite on one rank at 20 random steps of 40, ZeRO 0 to 3, fp32 and bf16, 1 and 2 ranks, accumulation
1 and 2, each with two draws of what goes wrong, which must end in the same bits. flips: one random bit of one rank's replicated state,
100 times, and 1,000 comparisons without. stragglers: one rank that takes twice as long. spikes: the losses of 1,000 steps of the
quickstart as they are, and threefold at one step, for each seventh step. Each part can be taken alone; the results of the others stay.
"""

import argparse
import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import ROOT, environment, results_folder
from benchmarks.whole_file import write_json
from fasttrain.data.prepare.digits import prepare_digits
from fasttrain.engine.checksum import differing
from fasttrain.engine.distributed import Processes
from fasttrain.lines import records
from fasttrain.spikes import Spikes, losses_by_step
from tests.commands import fasttrain
from tests.engine.test_checksum import flip
from tests.ranks import run_ranks
from tests.runs import GLOBAL_BATCH, plain_config, start, zero
from tests.test_skipping import BAD, STEPS, Plan, train_all
from tests.test_stragglers import reports

RESULT = results_folder(torch.device("cpu")) / "numerical_faults.json"
FLIPS, CLEAN, THRESHOLD = 100, 1000, 8.0
EVERY_STAGE = (0, 1, 2, 3)


def skips(folder: Path, shards: Path) -> list[dict[str, Any]]:
    """For each case of ranks, stage, precision and accumulation: how many bad steps were skipped, and what they changed."""
    rows = []
    for ranks, accumulation in ((1, 1), (1, 2), (2, 1), (2, 2)):
        cases = [(stage, precision) for stage in EVERY_STAGE for precision in ("fp32", "bf16")]
        plans = [Plan.drawn(draw, ranks, accumulation) for draw in range(2 * len(cases))]
        raws = [_skipping(folder, shards, ranks, accumulation, *cases[i // 2]) for i in range(len(plans))]
        per_rank = run_ranks(ranks, train_all, raws, plans)
        for i, (stage, precision) in enumerate(cases):
            pairs = [(share[j], plans[j]) for share in per_rank for j in (2 * i, 2 * i + 1)]
            one, other = (per_rank[0][2 * i + j]["state"] for j in (0, 1))
            rows.append(
                {
                    **{"ranks": ranks, "accumulation": accumulation, "stage": stage, "precision": precision},
                    "bad": 2 * BAD,
                    "skipped_on_all_ranks": min(len(set(result["skipped"]) & set(plan.bad)) for result, plan in pairs) * 2,
                    "good_steps_skipped": max(len(set(result["skipped"]) - set(plan.bad)) for result, plan in pairs),
                    "changed_something": sum(len(result["touched"]) for result, _ in pairs),
                    "same_bits_at_the_end": all(torch.equal(t, other[key][name]) for key in one for name, t in one[key].items()),
                }
            )
    return rows


def _skipping(folder: Path, shards: Path, ranks: int, accumulation: int, stage: int, precision: str) -> dict[str, Any]:
    training = {"steps": STEPS, "precision": precision, "micro_batch": GLOBAL_BATCH // ranks // accumulation, "clip": 1.0}
    return plain_config(folder / "skips", shards, deepspeed=zero(stage), training=training)


def flips(folder: Path, shards: Path) -> list[dict[str, Any]]:
    """For each stage that has replicas: how many flips were noticed, and how many comparisons of equal copies gave an alarm."""
    raws = [plain_config(folder / "flips", shards, deepspeed=zero(stage), training={"precision": "bf16"}) for stage in (0, 1, 2)]
    return [{"stage": stage, **run_ranks(2, _flipped, raw)[0]} for stage, raw in enumerate(raws)]


def _flipped(processes: Processes, raw: dict[str, Any]) -> dict[str, int]:
    trainer, draw, noticed = start(processes, raw), random.Random(3), 0
    for _ in range(3):
        trainer.train_step()
    tensors = list(trainer.state.replicated())
    for trial in range(FLIPS):
        tensor, seed = draw.choice(tensors)[1], draw.random()
        for sound in (False, True):  # the second flip mends the first
            if processes.rank == trial % 2:
                flip(tensor, random.Random(seed))
            noticed += not sound and differing(processes, iter(tensors)) is not None
    alarms = sum(differing(processes, iter(tensors)) is not None for _ in range(CLEAN))
    trainer.loader.close()
    return {"flips": FLIPS, "noticed": noticed, "comparisons": CLEAN, "false_alarms": alarms}


def stragglers(folder: Path, shards: Path) -> list[dict[str, Any]]:
    """For 2 and 4 ranks and each stage: which rank was named, its score and share."""
    rows = []
    for ranks, slow in ((2, 1), (4, 2)):
        training = {"micro_batch": GLOBAL_BATCH // ranks // 2}
        raws = [plain_config(folder / "slow", shards, deepspeed=zero(stage), training=training) for stage in EVERY_STAGE]
        for stage, report in enumerate(run_ranks(ranks, reports, raws, slow)[0]):
            found = report["slowest"]
            rows.append({"ranks": ranks, "stage": stage, "slow": slow, **{key: found[key] for key in ("rank", "score", "share")}})
    return rows


def spikes(folder: Path, shards: Path) -> list[dict[str, Any]]:
    """Of the quickstart: the largest deviation of its own losses, the false alarms, and how many planted spikes were found."""
    overrides = ["training.steps=1000", "sampling.every=null", "log.held_out_every=null", "log.tensorboard=false", "checkpoint.every=1000"]
    places = [f"data.train={shards}", f"run_dir={folder / 'spikes'}"]
    done = fasttrain("train", ROOT / "configs" / "quickstart.yaml", *places, *overrides)
    assert done.status == 0, done
    losses = [loss for record in records(folder / "spikes" / "metrics.jsonl") for _, loss in losses_by_step(record)]
    planted = [(step, _judged([*losses[: step - 1], 3 * losses[step - 1], *losses[step:]])) for step in range(61, len(losses) + 1, 7)]
    return [
        {
            "steps": len(losses),
            "false_alarms": len(_judged(losses)),
            "largest_deviation": max(spike.deviations for spike in Spikes(-math.inf).judge(1, losses)),
            "planted": len(planted),
            "found_at_its_step": sum(found == [step] for step, found in planted),
        }
    ]


def _judged(losses: list[float]) -> list[int]:
    return [spike.step for spike in Spikes(THRESHOLD).judge(1, losses)]


PARTS: dict[str, Callable[[Path, Path], list[dict[str, Any]]]] = {
    "skips": skips,
    "flips": flips,
    "stragglers": stragglers,
    "spikes": spikes,
}


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """A part's rows as a table."""
    table = Table(*rows[0], title=name)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    """Plants the faults, prints the tables and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    results = json.loads(RESULT.read_text())["results"] if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare_digits(folder / "digits")
        for name in args.parts:
            results[name] = PARTS[name](folder, folder / "digits")
            show(name, results[name])
            write_json(RESULT, {"benchmark": "numerical_faults", "environment": environment(torch.device("cpu")), "results": results})


if __name__ == "__main__":
    main()
