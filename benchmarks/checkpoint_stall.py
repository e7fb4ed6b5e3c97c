"""What a checkpoint costs training: the stall of a save beside it, against the time until one is durable.

    python -m benchmarks.checkpoint_stall [--rounds 5] [--ranks 1 2] [--folder DIR]

ViT-B (12 blocks of width 768) on digits, fp32, ZeRO 1, one thread a rank, checkpoints written to a folder on this machine's disk. In
each round, in turn: steps without a save; a save waited for, which is what it would cost a step if it were not beside it; a save begun,
and steps until it is durable. The first save also makes the buffers; it is reported apart.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, results_folder
from benchmarks.loader import spread
from benchmarks.tables import checkpoint_rows, show
from benchmarks.whole_file import write_json
from fasttrain.checkpoint import Manifest
from fasttrain.data.prepare.digits import prepare_digits
from fasttrain.engine.distributed import Processes
from fasttrain.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero

CPU = torch.device("cpu")
RESULT = results_folder(CPU) / "checkpoint.json"
QUIET_STEPS = 4


def config(folder: Path) -> dict[str, Any]:
    """ViT-B at the smallest batch that two ranks share evenly."""
    return plain_config(
        folder / "run",
        folder / "digits",
        model={"depth": 12, "width": 768, "heads": 12, "patch": 2},
        training={"steps": 10**6, "global_batch": 8, "timeout_seconds": 600},
        checkpoint={"keep_last": 1},
        deepspeed=zero(1),
    )


def measure(processes: Processes, raw: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The figures of one world size; call on every rank."""
    trainer = start(processes, raw)
    steps(trainer, 2)
    first = stall_of(trainer)
    trainer.saver.finish()
    measured = [one_round(trainer, processes) for _ in range(rounds)]
    size = sum(file.bytes for file in Manifest.read(trainer.saver.saved).files.values()) if trainer.saver.saved else 0
    parameters = sum(p.numel() for p in trainer.network.parameters())
    trainer.loader.close()
    return {"ranks": processes.world_size, "parameters": parameters, "bytes": size, "first_stall_seconds": first, "rounds": measured}


def one_round(trainer: Trainer, processes: Processes) -> dict[str, Any]:
    """Steps alone, a save that is waited for, and a save beside steps."""
    quiet = steps(trainer, QUIET_STEPS)
    begin = time.perf_counter()
    stall_of(trainer)
    trainer.saver.finish()
    durable = time.perf_counter() - begin
    steps(trainer, 1)
    begin = time.perf_counter()
    stall, beside = stall_of(trainer), []
    while not processes.all(saved(trainer)):
        beside += steps(trainer, 1)
    until = time.perf_counter() - begin
    trainer.saver.finish()
    extra = sum(beside) - len(beside) * statistics.median(quiet)
    return {
        "quiet_step_seconds": quiet,
        "waited_for_seconds": durable,
        "stall_seconds": stall,
        "beside_step_seconds": beside,
        "beside_until_durable_seconds": until,
        "beside_extra_seconds": extra,
    }


def saved(trainer: Trainer) -> bool:
    """Whether what was begun is durable: by what is known on this rank."""
    newest = trainer.saver.saved
    return newest is not None and newest.name.endswith(f"{trainer.saved_step:08d}")


def stall_of(trainer: Trainer) -> float:
    """Begins to save the step that was reached."""
    trainer.save()
    return trainer.saver.stall_seconds


def steps(trainer: Trainer, count: int) -> list[float]:
    """Takes steps; the seconds of each."""
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        trainer.train_step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians and ranges over the rounds."""
    rounds = measured["rounds"]
    ones = ("waited_for_seconds", "stall_seconds", "beside_until_durable_seconds", "beside_extra_seconds")
    found = {name: spread([each[name] for each in rounds]) for name in ones}
    for name in ("quiet_step_seconds", "beside_step_seconds"):
        found[name] = spread([value for each in rounds for value in each[name]])
    found["ratio"] = spread([each["waited_for_seconds"] / each["stall_seconds"] for each in rounds])
    return {**measured, **found}


def report(results: list[dict[str, Any]], rounds: int) -> None:
    """The table on the screen, and the same figures as JSON."""
    settings = {"model": "vit-b/2 on digits", "precision": "fp32", "zero_stage": 1, "global_batch": 8, "threads_per_rank": 1}
    settings["rounds"] = rounds
    result = {"benchmark": "checkpoint", "environment": environment(CPU), "settings": settings, "results": results}
    head, rows = checkpoint_rows(result)
    show(head, rows, f"what a checkpoint of ViT-B costs training, ZeRO 1: median (min to max) of {rounds} rounds")
    write_json(RESULT, result)


def main() -> None:
    """Measures, prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    results = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            prepare_digits(Path(folder) / "digits")
            results.append(summary(run_ranks(ranks, measure, config(Path(folder)), args.rounds)[0]))
    report(results, args.rounds)


if __name__ == "__main__":
    main()
