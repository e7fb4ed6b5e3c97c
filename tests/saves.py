"""Saves without a model: states whose every element is the step's number, saved by the real writer, also in processes that are killed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint import Manifest, Progress, read_weights
from fasttrain.config import CheckpointConfig
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER, Fragment
from fasttrain.saving import Saver

KEYS = [MASTER, "exp_avg"]
SIZE = 40_000  # elements of a parameter: a share of two ranks' is 320 kB


class State:
    """A training state without a model: two parameters, cut in as many slices as there are ranks; every element is the step's number."""

    def __init__(self, processes: Processes):
        self.shapes = {"a": [SIZE // 100, 100], "b": [7]}
        self.keys = KEYS
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
    saver.begin(state, Progress(step, step, step), {}, 1)  # type: ignore[arg-type]


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
