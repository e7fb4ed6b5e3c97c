"""What a rank really holds of the training state under ZeRO 0 to 3, measured, beside the estimate of models/memory.py.

    python -m benchmarks.state_per_rank

Masters, moments and averages: the bytes of the storages behind them, each storage once. Process memory: the growth of the resident set
from before the trainer is built to after a step, which also holds weights, gradients, DeepSpeed's buffers and the allocator's slack.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import ROOT, environment
from benchmarks.whole_file import write_json
from fasttrain.data.prepare.digits import prepare_digits
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER
from fasttrain.models.memory import memory_per_rank
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero

RESULT = ROOT / "benchmarks" / "results" / "cpu" / "state_per_rank.json"
MIB = 2**20
EMA_COUNT = 1


def run_config(folder: Path, digits: Path, stage: int, depth: int, width: int) -> dict[str, Any]:
    """A ViT of many parameters and few tokens, so that state outweighs activations; bf16 weights, fp32 masters."""
    model = {"name": "vit", "depth": depth, "width": width, "heads": 4, "patch": 4, "num_timesteps": 1000}
    training = {"precision": "bf16", "global_batch": 4}
    return plain_config(folder / f"zero{stage}", digits, model=model, training=training, deepspeed=zero(stage))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind these tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(processes: Processes, raw: dict[str, Any]) -> dict[str, int]:
    """Bytes of the state that this rank holds after a step, by kind, and the growth of its process."""
    before = psutil.Process().memory_info().rss
    trainer = start(processes, raw)
    trainer.train_step()
    grown = psutil.Process().memory_info().rss - before
    of = {key: storage_bytes(fragment.state[key] for fragment in trainer.state.fragments) for key in trainer.state.keys}
    trainer.loader.close()
    parameters = sum(int(torch.Size(shape).numel()) for shape in trainer.state.shapes.values())
    averages = sum(count for key, count in of.items() if key.startswith("ema"))
    moments = of["exp_avg"] + of["exp_avg_sq"]
    return {"parameters": parameters, "master": of[MASTER], "moments": moments, "averages": averages, "process": grown}


def measure(
    folder: Path, digits: Path, worlds: Iterable[int], depth: int, width: int, stages: Sequence[int] = range(4)
) -> list[dict[str, Any]]:
    """Every world size and stage, in processes of their own: the most that any rank holds, and the estimate."""
    rows = []
    for world_size in worlds:
        for stage in stages:
            raw = run_config(folder / str(world_size), digits, stage, depth, width)
            per_rank = run_ranks(world_size, held, raw)
            most = {key: max(rank[key] for rank in per_rank) for key in per_rank[0]}
            estimate = memory_per_rank(most["parameters"], stage, world_size, 2, EMA_COUNT)
            state = most["master"] + most["moments"] + most["averages"]
            rows.append(
                {"world_size": world_size, "stage": stage, **most, "state": state, "estimate": estimate["optimizer"] + estimate["ema"]}
            )
    return rows


def main() -> None:
    """Measures, prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        prepare_digits(Path(scratch) / "digits")
        rows = measure(Path(scratch), Path(scratch) / "digits", args.worlds, args.depth, args.width)
    table = Table("ranks", "ZeRO", "master", "moments", "averages", "state", "estimate", "process grew by")
    for row in rows:
        sizes = (f"{row[key] / MIB:.0f}" for key in ("master", "moments", "averages", "state", "estimate", "process"))
        table.add_row(str(row["world_size"]), str(row["stage"]), *sizes)
    console = Console(highlight=False)
    console.print(table, f"MiB, the most of any rank; {rows[0]['parameters']:,} parameters, bf16 weights, fp32 state, {EMA_COUNT} average")
    result = {"benchmark": "state per rank", "environment": environment(torch.device("cpu")), "settings": vars(args), "rows": rows}
    write_json(RESULT, {**result, "seconds": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
