"""Real process groups for tests: functions run on several ranks, each a process of its own that speaks gloo on this machine.

The processes are forked from a server that has imported once what they need: a rank trains within a third of a second of CPU time.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from fasttrain.engine import distributed

TIMEOUT = 240.0

# What DeepSpeed and torch import only when an engine is made, torch's whole compiler among it: a second of CPU time in each process.
IMPORTED_LATE = [
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._subclasses.schema_check_mode",
    "torch.profiler._cupti_monitor",
    "rich._emoji_codes",
]
IMPORTED = ["deepspeed", "fasttrain.trainer", "fasttrain.data.vae", "fasttrain.commands.train", "fasttrain.commands.sample", "pytest"]
PRELOADED = [*IMPORTED, *IMPORTED_LATE, "tests.frozen"]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(processes, *args)` returns on each of `world_size` ranks, in rank order; fails with the first rank's traceback."""
    results = _server.Queue()
    port = free_port()
    processes = [_server.Process(target=_rank, args=(rank, world_size, port, results, function, args)) for rank in range(world_size)]
    for process in processes:
        process.start()
    try:
        outcomes: dict[int, Any] = {}
        for _ in processes:
            rank, result, failure = results.get(timeout=TIMEOUT)
            assert failure is None, f"rank {rank} of {world_size}:\n{failure}"
            outcomes[rank] = pickle.loads(result)
        return [outcomes[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        # As plain bytes: torch would hand its tensors over through a server that ends with this process.
        results.put((rank, pickle.dumps(function(distributed.start(TIMEOUT), *args)), None))
        distributed.finish()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
