"""Samples a second on one core: this loader beside webdataset's own decode pipeline, on the same shards, in one run.

    python -m benchmarks.loader [--rounds 7] [--seconds 2]

Shards of 8 KiB latents are written to a scratch folder by fasttrain's own writer, digests are compared once before the clock starts, and
the page cache is warm. The arms take turns, so that whatever else the machine does falls on both. Both give stacked batches of 256,
shuffled: ours over the whole set, webdataset's over a buffer of 1,000 that is full before the clock starts.

Then what a node of eight GPUs would wait for, from local shards and from a web server with latency and drops (`benchmarks/node.py`).
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset

from benchmarks import node
from benchmarks.environment import environment, results_folder
from benchmarks.tables import WAIT_COLUMNS, show
from benchmarks.whole_file import write_json
from fasttrain.data.index import Source, VaeRecord
from fasttrain.data.loader import Loader
from fasttrain.data.order import Order
from fasttrain.data.prepare.assembly import prepare_set
from fasttrain.data.prepare.plan import Plan
from fasttrain.data.prepare.writer import Made
from fasttrain.data.shards import ShardSet

SHAPE = (2, 2, 4, 16, 16)  # fp16: 8 KiB
SAMPLES, SHARD_SIZE = 16_384, 2_048
NODE_SAMPLES, NODE_SHARD_SIZE = 32_768, 1_024
CACHE_GIB = 0.2  # less than the node's set of 0.25: shards leave the cache and are fetched again
LATENCY, DROPS = 0.05, 0.02
BATCH = 256
CPU = torch.device("cpu")
RESULT = results_folder(CPU) / "loader.json"


def write_shards(out: Path, samples: int = SAMPLES, shard_size: int = SHARD_SIZE) -> ShardSet:
    """Latents of noise."""

    def noise(entries: Sequence[int]) -> Iterator[Made]:
        rng = np.random.default_rng(entries[0])
        for entry in entries:
            yield Made(str(entry), (rng.standard_normal(SHAPE, np.float32).astype(np.float16), entry % 1000))

    plan = Plan(
        kind="latent",
        shape=SHAPE,
        dtype="float16",
        classes=tuple(map(str, range(1000))),
        source=Source(name="noise", xxh3="0" * 32),
        entries=range(samples),
        shard_size=shard_size,
        vae=VaeRecord(id="none", scaling_factor=1.0),
    )
    prepare_set(out, plan, noise, lambda folder, receipts: {"latent_shift": (0.0,) * 4, "latent_scale": (1.0,) * 4})
    shards = ShardSet.open(out)
    shards.gather(np.arange(0, samples, shard_size // 2))
    return shards


def our_batches(shards: ShardSet) -> Iterator[object]:
    """Order, gather and tensors, in this thread; the transform belongs to the GPU and is left out, as in the other arm."""
    order = Order(SAMPLES, shards.index.shard_samples, seed=0)
    return Loader(shards, order, lambda stored, position: stored, threads=0).batches(0, BATCH)


def webdataset_batches(shards: ShardSet) -> Iterator[object]:
    """webdataset as its documentation shows it: shuffle, decode, to_tuple, batched."""
    urls = [f"{shards.files.place}/{shard.file}" for shard in shards.index.shards]
    while True:
        yield from webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("npy", "cls").batched(BATCH)


def measure(batches: Iterator[object], seconds: float) -> dict[str, float]:
    """Samples over a stretch of at least `seconds`: a second, and a second of this process's own CPU time, whatever else runs."""
    start, began, count = time.perf_counter(), time.process_time(), 0
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        count += BATCH
    return {"second": count / passed, "cpu_second": count / (time.process_time() - began)}


def check_parity(shards: ShardSet) -> None:
    """Both arms give the same samples, or neither has a speed."""
    urls = [f"{shards.files.place}/{shard.file}" for shard in shards.index.shards[:1]]
    theirs = itertools.islice(webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("npy", "cls"), 100)
    arrays, labels, _ = shards.gather(np.arange(100))
    for (array, label), ours, our_label in zip(theirs, arrays, labels, strict=True):
        if label != our_label or not np.array_equal(array, ours):
            raise SystemExit("the two arms read different samples")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range of the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Measures, prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each arm in each round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "set")
        check_parity(shards)
        arms = {"fasttrain": our_batches(shards), "webdataset": webdataset_batches(shards)}
        for batches in arms.values():
            next(batches)
        rounds = [{name: measure(batches, args.seconds) for name, batches in arms.items()} for _ in range(args.rounds)]
        waits = measure_node(Path(folder))
    report(rounds, waits, args.seconds)


def measure_node(folder: Path) -> dict[str, dict[str, float]]:
    """What the eight ranks of a node wait for, by where the shards are."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    write_shards(folder / "node", NODE_SAMPLES, NODE_SHARD_SIZE).close()
    return {
        "local": node.waits(str(folder / "node")),
        "http": node.streamed(folder / "node", folder / "clean", CACHE_GIB, LATENCY, 0.0),
        "http with drops": node.streamed(folder / "node", folder / "dropped", CACHE_GIB, LATENCY, DROPS),
    }


def report(rounds: Sequence[dict[str, dict[str, float]]], waits: dict[str, dict[str, float]], seconds: float) -> None:
    """The tables on the screen, and the same figures as JSON."""
    by = {clock: {name: spread([each[name][clock] for each in rounds]) for name in rounds[0]} for clock in ("second", "cpu_second")}
    ratios = {clock: spread([each["fasttrain"][clock] / each["webdataset"][clock] for each in rounds]) for clock in by}
    sample_bytes = int(np.prod(SHAPE)) * 2
    rows = []
    for name in rounds[0]:
        rates = [by[clock][name] for clock in by]
        told = [f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})" for rate in rates]
        rows.append([name, *told, *(f"{rate['median'] * sample_bytes / 1e9:.2f}" for rate in rates)])
    rows.append(["ratio", *(f"{ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f})" for ratio in ratios.values()), "", ""])
    head = ["", "samples a second", "a second of its own CPU time", "GB/s", "GB a CPU second"]
    show(head, rows, f"one core, 8 KiB samples, batches of {BATCH}: median (min to max) of {len(rounds)} alternating rounds")
    told = [[name, *(f"{each[key]:.1f}" for key in WAIT_COLUMNS), f"{each['stall_share']:.2%}"] for name, each in waits.items()]
    show(["", *WAIT_COLUMNS.values(), "stall"], told, f"a node of {node.RANKS} readers, steps of {node.STEP} s: its wait a step")
    result = {
        "benchmark": "loader",
        "environment": {**environment(CPU), "cores_used": 1},
        "settings": {"samples": SAMPLES, "sample_bytes": sample_bytes, "batch": BATCH, "rounds": len(rounds), "seconds": seconds},
        "load_average": os.getloadavg()[0],
        "samples_per_second": by["second"],
        "samples_per_cpu_second": by["cpu_second"],
        "ratio": ratios["second"],
        "cpu_ratio": ratios["cpu_second"],
        "rounds": list(rounds),
        "node": {
            "ranks": node.RANKS,
            "micro_batch": node.BATCH,
            "step_seconds": node.STEP,
            "images_per_second": node.RANKS * node.BATCH / node.STEP,
            "steps": node.STEPS,
            "warm_up_steps": node.WARM_UP,
            "latency_seconds": LATENCY,
            "drops": DROPS,
            "cache_gib": CACHE_GIB,
            "cores": os.cpu_count(),
            "waits": waits,
        },
    }
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
