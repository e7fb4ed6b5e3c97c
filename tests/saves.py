"""Saves without a model: states whose every element is the step's number, saved by the real writer, also in processes that are killed."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint import FORMAT, Checkpoints, Manifest, Plan, Progress, read_weights
from fasttrain.config import CheckpointConfig
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER, Fragment
from fasttrain.saving import Saver
from tests.ranks import TIMEOUT, free_port

_server = multiprocessing.get_context("forkserver")
KEYS = [MASTER, "exp_avg"]
SIZE = 40_000  # elements of a parameter: a share of two ranks' is 320 kB


class State:
    """A training state without a model: two parameters, cut in as many slices as there are ranks; every element is the step's number."""

    def __init__(self, processes: Processes):
        self.shapes = {"a": [SIZE // 100, 100], "b": [7]}
        self.keys = KEYS
        self.world_size = processes.world_size
        self.fragments = [f for name, numel in (("a", SIZE), ("b", 7)) for f in self._cut(name, numel, processes)]

    def _cut(self, name: str, numel: int, processes: Processes) -> list[Fragment]:
        cuts = [numel * rank // processes.world_size for rank in range(processes.world_size + 1)]
        start, end = cuts[processes.rank : processes.rank + 2]
        return [Fragment(name, start, {key: torch.zeros(end - start) for key in self.keys})]

    def owned(self) -> list[Fragment]:
        return self.fragments

    def take(self, step: int) -> None:
        for fragment in self.fragments:
            for tensor in fragment.state.values():
                tensor.fill_(step)


def saver_of(processes: Processes, run_dir: Path, **config: Any) -> Saver:
    return Saver(run_dir, processes, CheckpointConfig(**config), timeout_seconds=60)


def save(saver: Saver, state: State, step: int) -> None:
    state.take(step)
    saver.begin(state, plan_of(state, step))  # type: ignore[arg-type]


def plan_of(state: State, step: int, zero_stage: int = 1) -> Plan:
    return Plan(
        format=FORMAT,
        progress=Progress(step, step, step),
        identity={},
        shapes=state.shapes,
        states=state.keys,
        world_size=state.world_size,
        zero_stage=zero_stage,
    )


def is_of_step(folder: Path, step: int) -> bool:
    """Whether every element in a checkpoint is its step's number."""
    manifest = Manifest.read(folder)
    return all(bool((w == step).all()) for key in KEYS for w in read_weights(folder, manifest, key).values())


def names(run_dir: Path) -> list[str]:
    return sorted(f.name for f in (run_dir / "checkpoints").iterdir())


def wait_until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[int | None]:
    """The exit statuses of ranks that may be killed: -9 where one was."""
    port = free_port()
    ranks = [_server.Process(target=_rank, args=(rank, world_size, port, function, args)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(TIMEOUT)
    return [rank.exitcode for rank in ranks]


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(distributed.start(60), *args)


def newest_of(processes: Processes, run_dir: Path) -> tuple[str, list[str]]:
    found = Checkpoints(run_dir, processes).newest()
    assert found is not None
    return found[0].name, found[2]
