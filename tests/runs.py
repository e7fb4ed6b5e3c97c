"""Small real runs for tests: a config, a few steps of it, and a trace of everything that was drawn."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.latent_noising import Posterior
from torch import Tensor

from fasttrain.cond import Cond
from fasttrain.config import RunConfig, parse_config
from fasttrain.data.loader import Batch
from fasttrain.engine.distributed import Processes
from fasttrain.metrics import Reporter
from fasttrain.trainer import Trainer

GLOBAL_BATCH = 16


def plain_config(run_dir: Path | str, shards: Path | str, **sections: Any) -> dict[str, Any]:
    """A run of a very small ViT on digits, in fp32; `sections` replace or extend the config's."""
    base: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": {"train": str(shards)},
        "model": {"name": "vit", "depth": 2, "width": 32, "heads": 2, "patch": 2, "num_timesteps": 1000},
        "optimizer": {"learning_rate": 1e-3, "ema": [{"half_life": 500}]},
        "training": {"steps": 20, "global_batch": GLOBAL_BATCH, "precision": "fp32", "timeout_seconds": 60},
        "checkpoint": {"every": 1000},
        "log": {"every": 1, "tensorboard": False},
        "deepspeed": zero(1),
    }
    for name, section in sections.items():
        keeps = isinstance(section, dict) and isinstance(base.get(name), dict) and name != "deepspeed"
        base[name] = {**base[name], **section} if keeps else section
    return base


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed settings of a ZeRO stage; at stage 3 small parameters are cut up as well, or nothing would be."""
    extra = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **extra}}


def config(**sections: Any) -> RunConfig:
    """The validated form of `plain_config`."""
    return parse_config(plain_config(**sections), "test")


class Recorder:
    """Between trainer and loader, and around the objective: who drew which image, timestep and noise, and was told what."""

    def __init__(self, trainer: Trainer):
        self.drawn: dict[int, tuple[int, int, str]] = {}
        self.losses: list[float] = []
        self._trainer, self._objective = trainer, trainer.objective
        self._batch: Batch | None = None
        trainer.batches = self._watch(trainer.batches)
        trainer.objective = self  # type: ignore[assignment]

    def __call__(self, model: Any, clean: Tensor | Posterior, cond: Cond, position: Tensor, dtype: torch.dtype) -> Any:
        seen: list[Tensor] = []

        def watched(x_t: Tensor, t: Tensor, dropped: Cond) -> Tensor:
            seen.extend((t, x_t.detach().float()))
            dropped.map(lambda part: seen.append(part) or part)  # type: ignore[func-returns-value]
            return model(x_t, t, dropped)

        loss = self._objective(watched, clean, cond, position, dtype=dtype)
        assert self._batch is not None
        for i, n in enumerate(position.tolist()):
            told = hashlib.sha256(b"".join(part[i].numpy().tobytes() for part in seen[1:])).hexdigest()
            self.drawn[n] = (int(self._batch.sample_id[i]), int(seen[0][i]), told)
        self.losses.append(float(loss.loss.detach()))
        return loss

    def _watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for self._batch in batches:
            yield self._batch


def start(processes: Processes, raw: dict[str, Any]) -> Trainer:
    """A trainer of this config, resumed where its folder holds a checkpoint, ready for its next step."""
    trainer = Trainer(parse_config(raw, "test"), processes)
    trainer.config.run_dir.mkdir(parents=True, exist_ok=True)
    with Reporter(trainer.config.run_dir, processes, 1, tensorboard=False) as reporter:
        trainer.resume(reporter, trainer.find_checkpoint())
    trainer.batches = trainer.loader.batches(trainer.progress.position, trainer.micro_batch, processes.rank, processes.world_size)
    return trainer


def trace(processes: Processes, raw: dict[str, Any], steps: int, save: bool = False) -> dict[str, Any]:
    """Runs `steps` steps on every rank: each step's loss over all ranks, what was drawn at each position, and the final state.

    With `save`, a checkpoint is committed at the end. Call on every rank.
    """
    trainer = start(processes, raw)
    recorder = Recorder(trainer)
    for _ in range(steps):
        trainer.train_step()
    if save:
        trainer.save()
        trainer.saver.finish()
    trainer.loader.close()
    per_step = torch.tensor(recorder.losses, dtype=torch.float64).view(steps, -1).mean(dim=1)
    losses = (processes.sum(per_step) / processes.world_size).tolist()
    state = {key: trainer.state.full(key) for key in trainer.state.keys}
    trainer.engine.destroy()
    return {"losses": losses, "drawn": recorder.drawn, "state": state if processes.is_main else None, "progress": trainer.progress}


def traces(processes: Processes, raws: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """`trace` of several configs, one after another in the same processes."""
    return [trace(processes, raw, steps) for raw in raws]


def merged(per_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """One trace from those of all ranks: every position was drawn by exactly one of them."""
    drawn: dict[int, Any] = {}
    for share in per_rank:
        assert not drawn.keys() & share["drawn"].keys(), "a position was drawn twice"
        drawn.update(share["drawn"])
    return {**per_rank[0], "drawn": drawn}
