"""World size and ZeRO stage change in the middle of epochs: the same images in the same order, none lost, none twice, and the same losses.

    python -m benchmarks.elastic

Three parts, each against the uninterrupted run: chains over 2 -> 1 -> 4 -> 2 ranks with another ZeRO stage after each change, one chain
that visits 8 ranks, and the loader alone, 1,000 steps of it, over world sizes, threads and changes on the way.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import ROOT, environment
from benchmarks.whole_file import write_json
from fasttrain.data.config import DataConfig
from fasttrain.data.loader import training_loader
from fasttrain.data.prepare.digits import prepare_digits
from fasttrain.data.shards import ShardSet
from tests.ranks import run_ranks
from tests.runs import GLOBAL_BATCH, merged, plain_config, trace, zero

RESULT = ROOT / "benchmarks" / "results" / "cpu" / "elastic.json"
# Sums of fp32 numbers in another order, as in tests/test_invariance.py.
LOSS_ROUNDING = 5e-6
SAMPLES, HELD_OUT = 1797, 1700  # 97 images an epoch: six steps and one image more


class Segment(NamedTuple):
    """A stretch of a run: on so many ranks, under this ZeRO stage, for so many steps."""

    world_size: int
    stage: int
    steps: int


class Outcome(NamedTuple):
    """A chain beside the uninterrupted run.

    Attributes:
        positions: images drawn.
        epochs: of the data set, in all.
        same_draws: every position drew the same image, timestep, noise and label drop, exactly once.
        loss_difference: the largest relative one of any step.
    """

    segments: list[Segment]
    positions: int
    epochs: float
    same_draws: bool
    loss_difference: float

    @property
    def fine(self) -> bool:
        return self.same_draws and self.loss_difference <= LOSS_ROUNDING


def chains(steps: int) -> list[list[Segment]]:
    """Every stage on every place of 2 -> 1 -> 4 -> 2, and 2 -> 8 -> 1."""
    orders = ((1, 2, 3, 1), (2, 3, 1, 2), (3, 1, 2, 3))
    over_four = [[Segment(world, stage, steps) for world, stage in zip((2, 1, 4, 2), order, strict=True)] for order in orders]
    return [*over_four, [Segment(2, 1, steps), Segment(8, 3, steps), Segment(1, 2, steps)]]


def run_config(run_dir: Path, shards: Path, stage: int) -> dict[str, Any]:
    """A small run over few images, so that epochs end on the way; mirrored views, so that a flip would show."""
    return plain_config(run_dir, shards, deepspeed=zero(stage), data={"flip": True, "held_out": HELD_OUT}, log={"timestep_ranges": 1})


def follow(chain: Sequence[Segment], run_dir: Path, shards: Path) -> dict[str, Any]:
    """The trace of a run that stops, saved, at the end of each segment and goes on in the next."""
    parts = [merged(run_ranks(s.world_size, trace, run_config(run_dir, shards, s.stage), s.steps, True)) for s in chain]
    drawn: dict[int, Any] = {}
    for part in parts:
        assert not drawn.keys() & part["drawn"].keys(), "a position was drawn twice"
        drawn.update(part["drawn"])
    return {"drawn": drawn, "losses": [loss for part in parts for loss in part["losses"]]}


def compare(chain: Sequence[Segment], found: dict[str, Any], whole: dict[str, Any]) -> Outcome:
    """A chain's trace beside the start of the uninterrupted run's."""
    steps = sum(segment.steps for segment in chain)
    expected = {n: what for n, what in whole["drawn"].items() if n < steps * GLOBAL_BATCH}
    losses = list(zip(found["losses"], whole["losses"][:steps], strict=True))
    same = found["drawn"] == expected and sorted(expected) == list(range(steps * GLOBAL_BATCH))
    difference = max(abs(one - other) / abs(other) for one, other in losses)
    return Outcome(list(chain), len(expected), len(expected) / (SAMPLES - HELD_OUT), same, difference)


def order_of(shards: Path, legs: Sequence[tuple[int, int]], threads: int, micro_batch: int = 4) -> list[int]:
    """The sample_ids by position that the loader alone gives over legs of (world size, steps): all ranks of each, one after another."""
    by_position: dict[int, int] = {}
    data, start = DataConfig(train=str(shards), threads=threads), 0
    for world_size, steps in legs:
        batches = steps * GLOBAL_BATCH // (world_size * micro_batch)
        for rank in range(world_size):
            with closing(training_loader(data, ShardSet.open(data.train, data), torch.tensor(3))) as loader:
                for batch in islice(loader.batches(start, micro_batch, rank, world_size), batches):
                    for n, sample in zip(batch.position.tolist(), batch.sample_id.tolist(), strict=True):
                        assert n not in by_position, f"position {n} was drawn twice"
                        by_position[n] = sample
        start += steps * GLOBAL_BATCH
    assert sorted(by_position) == list(range(start)), "a position was lost"
    return [by_position[n] for n in range(start)]


def order_cases(steps: int) -> list[tuple[list[tuple[int, int]], int]]:
    """(legs, threads) of every world size and number of threads, and with changes on the way."""
    third = steps // 3
    changing = [(2, third), (1, third), (4, steps - 2 * third)]
    return [([(world, steps)], threads) for world in (1, 2, 4) for threads in (0, 1, 3)] + [(changing, threads) for threads in (0, 3)]


def orders_agree(shards: Path, steps: int) -> int:
    """How many ways of reading gave the same order; raises where one did not."""
    first, *others = [order_of(shards, legs, threads) for legs, threads in order_cases(steps)]
    assert all(order == first for order in others), f"the order of {shards} depends on how it is read"
    return 1 + len(others)


def main() -> None:
    """Runs the parts, prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="of each segment: 7 end in the middle of an epoch")
    parser.add_argument("--order-steps", type=int, default=1000)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare_digits(folder / "digits")
        most = max(sum(segment.steps for segment in chain) for chain in chains(args.steps))
        whole = merged(run_ranks(1, trace, run_config(folder / "whole", folder / "digits", 1), most))
        followed = [
            compare(chain, follow(chain, folder / f"chain{i}", folder / "digits"), whole) for i, chain in enumerate(chains(args.steps))
        ]
        ways = orders_agree(folder / "digits", args.order_steps)
    _print(followed, ways, args.order_steps)
    result = {
        "benchmark": "elastic",
        "environment": environment(torch.device("cpu")),
        "settings": {"steps": args.steps, "order_steps": args.order_steps, "global_batch": GLOBAL_BATCH, "loss_rounding": LOSS_ROUNDING},
        "chains": [{**outcome._asdict(), "segments": [segment._asdict() for segment in outcome.segments]} for outcome in followed],
        "order": {"ways": ways, "positions": args.order_steps * GLOBAL_BATCH, "identical": True},
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(RESULT, result)
    if not all(outcome.fine for outcome in followed):
        raise SystemExit("a chain differs from the uninterrupted run")


def _print(followed: Sequence[Outcome], ways: int, steps: int) -> None:
    table = Table("ranks", "ZeRO", "images", "epochs", "same images, order, noise", "largest loss difference")
    for outcome in followed:
        worlds, stages = (" -> ".join(str(segment[i]) for segment in outcome.segments) for i in (0, 1))
        same = "yes" if outcome.same_draws else "NO"
        table.add_row(worlds, stages, str(outcome.positions), f"{outcome.epochs:.1f}", same, f"{outcome.loss_difference:.1e}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"the loader alone: {ways} ways to read {steps} steps (world sizes 1, 2, 4 and changes; threads 0, 1, 3), one order")


if __name__ == "__main__":
    main()
