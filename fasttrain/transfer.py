"""A new run's weights from elsewhere: what `init_from` asks for, planned before training starts, told, and filled into its state.

RUN/init.json holds the plan that was carried out: which weights, and what became of each parameter. A run that has a checkpoint goes on
from that, whatever `init_from` says.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.checkpoint import committed
from fasttrain.config import RunConfig
from fasttrain.data.index import Index
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER, Fragment, TrainingState
from fasttrain.errors import UserError
from fasttrain.files import write_whole
from fasttrain.init_from import InitFrom
from fasttrain.interchange.fitting import Fitting, Plan, Row
from fasttrain.interchange.rules import plan
from fasttrain.interchange.source import Source, of_data, open_source

FILE = "init.json"

Shapes = Mapping[str, Sequence[int]]
"""Of a network's trained parameters, by name."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """A source, and what a run's network takes from it."""

    asked: InitFrom
    source: Source
    plan: Plan

    @classmethod
    def open(cls, config: RunConfig, index: Index, shapes: Shapes) -> "Transfer":
        """Opens and plans what a resolved config's `init_from` asks for; reads no weights. `shapes` are of the trained parameters.

        Raises:
            UserError: as `open_source` and `rules.plan`.
        """
        assert config.init_from is not None
        source = open_source(config.init_from)
        plain = config.plain()
        fitting = Fitting(
            source=source,
            model=plain["model"],
            shapes={name: tuple(shape) for name, shape in shapes.items()},
            diffusion=plain["diffusion"],
            data=of_data(index, config.data.normalise),
            asked=config.init_from,
        )
        return cls(config.init_from, source, plan(fitting))

    @classmethod
    def of_new_run(cls, config: RunConfig, index: Index, shapes: Shapes, processes: Processes) -> "Transfer | None":
        """What a run is to begin with; None where its config asks for nothing, or it has a checkpoint already. A collective.

        Raises:
            UserError: as `open`; or ranks read different weights.
        """
        if config.init_from is None or processes.from_main(has_begun(config.run_dir) if processes.is_main else None):
            return None
        transfer = cls.open(config, index, shapes)
        if len(set(processes.gather(transfer.source.digest))) > 1:
            raise UserError(f"init_from: ranks read different weights from {config.init_from.source}: give every host the same")
        return transfer

    @classmethod
    def of_begun_run(cls, config: RunConfig, index: Index, shapes: Shapes) -> "Transfer | None":
        """What a run began with, for looking at its beginning again; None where it began from random numbers.

        Raises:
            UserError: as `open`; or the source holds other weights now.
        """
        record = read_record(config.run_dir)
        if record is None:
            return None
        transfer = cls.open(config.model_copy(update={"init_from": InitFrom.model_validate(record["init_from"])}), index, shapes)
        if transfer.source.digest != record.get("digest"):
            raise UserError(f"{config.run_dir} began from {record.get('source')}, which holds other weights now: restore it")
        return transfer

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter that does not stay as it is, with its values, fp32.

        Raises:
            UserError: one is not finite.
        """
        for row in self.plan.rows:
            if row.make is None:
                continue
            values = row.make()
            assert values.shape == row.shape, row.name
            if not torch.isfinite(values).all():
                raise UserError(f"init_from: {self.source.told} holds a {row.name} that is not finite: name another source")
            yield row.name, values

    def fill(self, state: TrainingState) -> None:
        """Writes them into a training state: masters, averages and, from those, what the model computes with. A collective."""
        places: dict[str, list[Fragment]] = {}
        for fragment in state.fragments:
            places.setdefault(fragment.name, []).append(fragment)
        for name, values in self.weights():
            for fragment in places.get(name, []):
                mine = values.reshape(-1)[fragment.start : fragment.start + fragment.numel]
                for key, view in fragment.state.items():
                    if key == MASTER or key.startswith("ema"):
                        view.copy_(mine)
        state.refresh_weights()

    def record(self) -> dict[str, Any]:
        """The plan as plain data."""
        rows = [
            {"parameter": row.name, "how": row.how, "shape": row.shape, "from": row.was, **({"why": row.why} if row.why else {})}
            for row in self.plan.rows
        ]
        return {
            "init_from": self.asked.model_dump(),
            "source": self.source.told,
            "digest": self.source.digest,
            "names": self.source.layout,
            "parameters": rows,
            "left_out": self.plan.left_out,
            "notes": self.plan.notes,
        }

    def begin(self, state: TrainingState, run_dir: Path, processes: Processes, say: Callable[[str], None]) -> None:
        """Fills the state, tells the plan and keeps it in the run's folder. A collective. Raises UserError as `weights`; OSError."""
        self.fill(state)
        say(self.table())
        before = read_record(run_dir)
        if before is not None and before.get("digest") != self.source.digest:
            say(
                f"init_from: an earlier start of this run, of which no checkpoint is left, began from other weights: {before.get('source')}"
            )
        if processes.is_main:
            write_whole(run_dir / FILE, json.dumps(self.record(), indent=1) + "\n")

    def table(self) -> str:
        """The plan for people: parameters that fare alike in all blocks are one line."""
        fates: list[tuple[str, str, str, str]] = [(row.how, row.name, _shapes(row), row.why) for row in self.plan.rows]
        fates += [("left out", name, "", why) for name, why in self.plan.left_out.items()]
        lines = Counter((how, re.sub(r"^blocks\.[0-9]+\.", "blocks.*.", name), shapes, why) for how, name, shapes, why in fates)
        cells = [(how, f"{name} x {count}" if count > 1 else name, shapes, why) for (how, name, shapes, why), count in lines.items()]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        told = ["  ".join(["", *map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in cells]
        notes = [f"  note: {note}" for note in self.plan.notes]
        return "\n".join([f"init_from: {self.source.told} ({self.source.layout} names)", *told, *notes])


def has_begun(run_dir: Path) -> bool:
    """Whether a run has a checkpoint, from which it goes on."""
    return bool(committed(run_dir / "checkpoints"))


def told_at_resume(config: RunConfig) -> str | None:
    """How a run that goes on from a checkpoint began, where its config or its folder says that it began elsewhere."""
    try:
        record = read_record(config.run_dir)
    except UserError as error:
        return str(error)
    if record is None:
        return None if config.init_from is None else f"init_from {config.init_from.source} is not used: this run began without it"
    told = f"this run began from {record.get('source')} ({config.run_dir / FILE})"
    if config.init_from is not None and record.get("init_from") != config.init_from.model_dump():
        return f"{told}; init_from is another now, and is not used"
    return told


def trained_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's trained parameters, before ZeRO 3 cuts them up."""
    return {name: tuple(p.shape) for name, p in network.named_parameters() if p.requires_grad}


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """What a run began from, as it wrote it down; None where it began from random numbers.

    Raises:
        UserError: its record cannot be read.
    """
    path = run_dir / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        InitFrom.model_validate(found["init_from"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} cannot be read, or is none of ours: restore it, or remove it to forget what the run began from") from None
    return found


def _shapes(row: Row) -> str:
    here = str(list(row.shape))
    return here if row.was in (None, row.shape) else f"{list(row.was)} -> {here}"  # type: ignore[arg-type]
