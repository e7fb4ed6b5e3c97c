"""How long the ranks of a node wait for their batches: eight readers, as eight GPUs have them, on this machine's cores.

What is simulated: eight processes, each the loader of one rank (one thread, four batches ahead, prepared latents of 8 KiB, micro-batches of
256), whose step on the GPU is a sleep of `STEP` seconds. So the demand is a node's (10,240 images a second), and all that serves it, the
web server of the streaming arms included, shares the cores of this machine. What is not: copies to a GPU, and a network that others use.
A step of the node waits for its slowest rank, so the wait of a step is the longest of the eight. The first steps are left out.
"""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttrain.data.config import DataConfig
from fasttrain.data.loader import Loader
from fasttrain.data.order import Order
from fasttrain.data.shards import ShardSet
from tests.http_server import Faults, FaultyServer

RANKS, BATCH = 8, 256
STEP, STEPS, WARM_UP = 0.2, 100, 20
STREAMS, WINDOW = 8, 1
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["fasttrain.data.loader", "tests.http_server"])


def waits(place: str, **keys: Any) -> dict[str, float]:
    """What the eight ranks wait for when they read the set at a place: per step of the node, and as a share of the time."""
    config = DataConfig(train=place, streams=STREAMS, window_shards=WINDOW, **keys)
    results, together = _fork.Queue(), _fork.Barrier(RANKS)
    processes = [_fork.Process(target=_rank, args=(rank, config, together, results), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    measured = np.array([results.get(timeout=300) for _ in processes])
    for process in processes:
        process.join()
    longest = measured[:, WARM_UP:].max(axis=0)
    return {
        "median_ms": 1e3 * float(np.median(longest)),
        "p99_ms": 1e3 * float(np.percentile(longest, 99)),
        "max_ms": 1e3 * float(longest.max()),
        "stall_share": float(longest.sum() / (longest.sum() + STEP * len(longest))),
        "first_ms": 1e3 * float(measured[:, 0].max()),
    }


def streamed(folder: Path, cache: Path, cache_gib: float, latency: float, drops: float) -> dict[str, float]:
    """`waits` when the set comes from a web server on this machine, in a process of its own, that is slow and drops connections."""
    address, stop = _fork.Queue(), _fork.Event()
    server = _fork.Process(target=_serve, args=(folder, Faults(latency=latency, drops=drops), address, stop), daemon=True)
    server.start()
    try:
        url, requests = address.get(timeout=60), 0
        found = waits(url, cache=str(cache), cache_gib=cache_gib)
    finally:
        stop.set()
    requests = address.get(timeout=60)
    server.join()
    return {**found, "requests": requests}


def _rank(rank: int, config: DataConfig, together: Any, results: Any) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS)
    torch.set_num_threads(1)
    shards = ShardSet.open(config.train, config)
    order = Order(len(shards), shards.index.shard_samples, 0, config.streams, config.window_shards)
    seconds = []
    with Loader(shards, order, lambda stored, position: stored, threads=1, ahead=4) as loader:
        batches = loader.batches(0, BATCH, rank, RANKS)
        together.wait()
        for _ in range(STEPS):
            start = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - start)
            time.sleep(STEP)
        together.wait()
    shards.close()
    results.put(seconds)


def _serve(folder: Path, faults: Faults, address: Any, stop: Any) -> None:
    with FaultyServer(folder, faults) as server:
        address.put(server.url)
        stop.wait()
    address.put(len(server.requests))
