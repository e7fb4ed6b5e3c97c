"""Steps not taken because a loss or a gradient was not finite: skipped by all ranks, written down, and too many in a row end the run.

RUN/skipped.jsonl     one record a skipped step
RUN/diverged.json     why a run ended: `training.max_skipped` of them in a row
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.config import RunConfig
from fasttrain.engine.distributed import Processes
from fasttrain.errors import DivergedError
from fasttrain.files import write_whole
from fasttrain.lines import Lines, jsonable, records
from fasttrain.metrics import Meters

FILE, REPORT = "skipped.jsonl", "diverged.json"


def with_its_gradient(loss: Tensor) -> Tensor:
    """The loss, whose gradient is not finite either where it is not: then the optimizer skips the step on all ranks. No host sync.

    (A sum of squares can overflow where its gradient does not. A factor of one changes no bit.)
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


class Skips:
    """The skipped steps of a run, known to every rank.

    Attributes:
        in_a_row: the records of those just behind the newest step.
    """

    def __init__(self, config: RunConfig, processes: Processes):
        self.in_a_row: list[dict[str, Any]] = []
        self._config, self._processes = config, processes
        self._file = Lines(config.run_dir / FILE) if processes.is_main else None

    def resume(self, step: int) -> None:
        """Forgets the records of later steps, and counts on with those that end at this one. A collective."""
        mine: list[dict[str, Any]] = []
        if self._file is not None:
            self._file.forget_after(step)
            mine = _ending_at(step, list(records(self._config.run_dir / FILE)))
        self.in_a_row = self._processes.from_main(mine)

    def taken(self) -> None:
        """A step was taken."""
        self.in_a_row = []

    def note(self, step: int, position: int, grad_norm: float | None, learning_rate: float, meters: Meters) -> str:
        """Writes a skipped step down; returns what to tell. A collective, only at such steps.

        Args:
            position: of the step's first image.
            grad_norm, learning_rate: of the step.
            meters: that hold the step's losses.

        Raises:
            DivergedError: it is the last of `training.max_skipped` in a row.
        """
        shares = self._processes.gather(meters.last_step())
        rows = [[0.0, *(value for pair in by_range for value in pair)] for _, by_range in shares]
        ranks = [rank for rank, (losses, _) in enumerate(shares) if not all(map(math.isfinite, losses))]
        record = {
            "step": step,
            "position": position,
            "images": self._config.training.global_batch,
            "ranks": ranks,
            "losses": [losses for losses, _ in shares],
            "mse_by_timestep": meters.means(rows),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }
        self.in_a_row.append(record)
        if self._file is not None:
            self._file.write(record)
        if len(self.in_a_row) >= self._config.training.max_skipped:
            self._end(step)
        where = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "a gradient"
        return f"step {step} skipped on all ranks: {where} was not finite; see {FILE}, or `fasttrain replay {self._config.run_dir} {step}`"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _end(self, step: int) -> None:
        run_dir, count = self._config.run_dir, len(self.in_a_row)
        first = self.in_a_row[0]["step"]
        told = f"{count} steps in a row, {first} to {step}, had a loss or gradient that was not finite (training.max_skipped)"
        if self._processes.is_main:
            report = {
                "reason": told,
                "steps": [record["step"] for record in self.in_a_row],
                "last_checkpoint": _newest(run_dir),
                "clip": self._config.training.clip,
                "precision": self._config.training.precision,
                "skipped": self.in_a_row,
            }
            told += _written(run_dir / REPORT, report)
        raise DivergedError(
            self._processes.from_main(told)
            + f". Look at one with `fasttrain replay {run_dir} {first}`; then lower optimizer.learning_rate, set training.clip, "
            "or mend the data, and continue from the last checkpoint, which is sound"
        )


def _ending_at(step: int, noted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_step = {record["step"]: record for record in noted}
    row: list[dict[str, Any]] = []
    while step in by_step:
        row.insert(0, by_step[step])
        step -= 1
    return row


def _newest(run_dir: Path) -> str | None:
    pointer = run_dir / "checkpoints" / "latest"
    return pointer.read_text().strip() if pointer.exists() else None


def _written(path: Path, report: dict[str, Any]) -> str:
    """Writes the report; what to tell of it."""
    try:
        write_whole(path, json.dumps(jsonable(report), indent=1) + "\n")
    except OSError as error:
        return f"; {path} could not be written: {error.strerror}"
    return f"; the report is {path}"
