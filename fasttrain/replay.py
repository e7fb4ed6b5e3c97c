"""One step of a run, taken again and watched: from the newest checkpoint before it on.

A run is a function of its config and data, so its steps can be taken again. Nothing that the run has written is touched.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.latent_noising import Posterior
from torch import Tensor

from fasttrain.checkpoint import Manifest, check_fits, committed, newest_sound, step_of
from fasttrain.cond import Cond
from fasttrain.config import RunConfig, SamplingConfig
from fasttrain.data.loader import Batch
from fasttrain.engine.deepspeed import full_gradients, gradient_norm
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.lines import records
from fasttrain.run import check_identity
from fasttrain.skipping import FILE
from fasttrain.spikes import losses_by_step
from fasttrain.trainer import Trainer
from fasttrain.transfer import Transfer


class Watched(Trainer):
    """A trainer that can take one step under watch, and writes nothing."""

    def __init__(self, config: RunConfig, processes: Processes):
        quiet = {"sampling": SamplingConfig(), "log": config.log.model_copy(update={"held_out_every": None})}
        super().__init__(config.model_copy(update=quiet), processes)
        self._watching = False
        self._micro_batches: list[dict[str, Any]] = []
        self._norms: dict[str, float] = {}

    def start_from(self, found: tuple[Path, Manifest] | None) -> None:
        """Takes up a checkpoint, or the beginning."""
        if found is not None:
            folder, manifest = found
            check_identity(self.identity, manifest.identity, folder)
            check_fits(manifest, self.state.shapes, self.state.keys, folder)
            self.checkpoints.load(self.state, folder, manifest)
            self.pareto.restore(manifest.timestep_weights)
            self.progress = manifest.progress
        elif transfer := Transfer.of_begun_run(self.config, self.index, self.state.shapes):
            transfer.fill(self.state)
        if self.config.training.compile:
            self.engine.compile()
        self.batches = self.loader.batches(self.progress.position, self.micro_batch, self.processes.rank, self.processes.world_size)

    def watched_step(self) -> dict[str, Any]:
        """Takes the next step and tells all of it: on rank 0 with every rank's micro-batches. A collective."""
        objective, batches = self.objective, self.batches
        self._watching, self.batches = True, self._noted(batches)
        self.objective = self._watch(objective)  # type: ignore[assignment]
        position = self.progress.position
        taken = self.train_step()
        total = math.sqrt(math.fsum(norm * norm for norm in self._norms.values()))
        shares = self.processes.gather(self._micro_batches)
        return {
            "step": self.progress.step,
            "position": position,
            "images": self.config.training.global_batch,
            "world_size": self.processes.world_size,
            "learning_rate": self.optimizer.learning_rate,
            "taken": taken,
            "loss": self.meters.reduce()["losses"][-1],
            "grad_norm": gradient_norm(self.engine) if taken else total,
            "clip": self.config.training.clip,
            "not_finite": [name for name, norm in self._norms.items() if not math.isfinite(norm)],
            "grad_norms": self._norms,
            "micro_batches": [batch for share in shares for batch in share],
        }

    def before_update(self, step: int) -> None:
        """Looks at the whole gradients, before the update clips and drops them."""
        super().before_update(step)
        if self._watching:
            self._norms = {name: _norm(gradient) for name, gradient in full_gradients(self.engine)}

    def _noted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            stored = batch.clean if isinstance(batch.clean, Tensor) else batch.clean[0]
            finite = torch.isfinite(stored.float().flatten(1)).all(dim=1)
            self._micro_batches.append({"sample_id": batch.sample_id.tolist(), "input_finite": finite.tolist()})
            yield batch

    def _watch(self, objective: Callable[..., Any]) -> Callable[..., Any]:
        def watched(model: Any, clean: Tensor | Posterior, cond: Cond, position: Tensor, dtype: torch.dtype) -> Any:
            loss = objective(model, clean, cond, position, dtype=dtype)
            told = {"position": position, "label": cond.labels, "timestep": loss.t, "loss": loss.weighted, "mse": loss.mse}
            mean = float(loss.weighted.mean())
            self._micro_batches[-1] = {
                "rank": self.processes.rank,
                "loss": mean,
                "finite": math.isfinite(mean),
                "samples": _rows({**self._micro_batches[-1], **{name: values.tolist() for name, values in told.items()}}),
            }
            return loss

        return watched


def replay(config: RunConfig, step: int, processes: Processes, say: Callable[[str], None]) -> dict[str, Any]:
    """Takes a run's step again; returns what was seen and how it compares with what the run wrote down. A collective.

    Raises:
        UserError: the run has no such step, or its data or model are not at hand.
    """
    recorded = _recorded(config, step)
    found, told = processes.from_main(_before(config.run_dir, step) if processes.is_main else None)
    trainer = Watched(config, processes)
    try:
        trainer.start_from(found)
        begun = trainer.progress.step
        say(f"{told}: {step - 1 - begun} steps to take before step {step}")
        while trainer.progress.step < step - 1:
            trainer.train_step()
        report = trainer.watched_step()
    finally:
        trainer.loader.close()
    return {**report, "from_step": begun, "recorded": recorded, "comparison": _compared(report, recorded)}


def _before(run_dir: Path, step: int) -> tuple[tuple[Path, Manifest] | None, str]:
    """The newest sound checkpoint of an earlier step, and what to tell of the start."""
    try:
        folder, manifest, passed_over = newest_sound(run_dir, before=step)
    except UserError as error:
        damaged = any(step_of(folder) < step for folder in committed(run_dir / "checkpoints"))
        return None, f"from the beginning{f' ({error})' if damaged else ''}"
    return (folder, manifest), "; ".join([*(f"passed over {one}" for one in passed_over), f"from {folder.name}"])


def _recorded(config: RunConfig, step: int) -> dict[str, Any]:
    """What the run wrote down of a step.

    Raises:
        UserError: the run did not come so far.
    """
    metrics, skipped = list(records(config.run_dir / "metrics.jsonl")), list(records(config.run_dir / FILE))
    steps = [record["step"] for record in (*metrics, *skipped)] + [step_of(f) for f in committed(config.run_dir / "checkpoints")]
    # A run that was killed may have taken some steps after its last report.
    reached = min(config.training.steps, max(steps, default=0) + config.log.every)
    if not 1 <= step <= reached:
        raise UserError(f"{config.run_dir} has no step {step} to replay: its steps are 1 to {reached}")
    losses = {at: loss for record in metrics for at, loss in losses_by_step(record)}
    skip = next((record for record in skipped if record["step"] == step), None)
    world_size = json.loads((config.run_dir / "environment.json").read_text()).get("world_size")
    return {"loss": losses.get(step), "skipped": skip, "world_size": world_size}


def _compared(report: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """Whether the step came out as it was written down, and in words."""
    skip, loss = recorded["skipped"], recorded["loss"]
    if loss is None and skip is None:
        return {"reproduced": None, "told": "the run wrote nothing down of this step to compare with"}
    if (skip is None) != report["taken"]:
        was, now = ("taken", "skipped") if skip is None else ("skipped", "taken")
        return {"reproduced": False, "told": f"not reproduced: the step was {was} in the run, and is {now} now"}
    if skip is not None:
        mine = sorted({batch["rank"] for batch in report["micro_batches"] if not batch["finite"]})
        same = mine == skip["ranks"] or report["world_size"] != recorded["world_size"]
        return {
            "reproduced": same,
            "told": "reproduced: skipped again" if same else f"skipped again, but by rank {mine}, not {skip['ranks']}",
        }
    return _compared_losses(report["loss"], loss, report["world_size"] == recorded["world_size"])


def _compared_losses(now: float, then: float, same_world: bool) -> dict[str, Any]:
    if now == then:
        return {"reproduced": True, "told": "reproduced: the same loss bit for bit"}
    apart = abs(now - then) / abs(then)
    near = apart < 1e-3
    why = "" if same_world else ", on another number of processes"
    return {"reproduced": near, "told": f"{'reproduced up to rounding' if near else 'not reproduced'}: {then} then, {now} now{why}"}


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient, dtype=torch.float32))
