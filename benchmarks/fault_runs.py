"""What fault trials share: small runs, the uninterrupted one that each must equal bit for bit, and what came of a trial."""

import dataclasses
import itertools
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.forked_ranks import Start
from benchmarks.moments import SAVING, TRAINING, Moment
from fasttrain.checkpoint import committed, newest_sound, read_weights, step_of
from fasttrain.lines import records
from tests.runs import plain_config, zero

EVERY = 3  # steps from save to save
RANKS = 2
LIMIT = 90.0  # seconds for anything that should take a few
# What a record says of the numbers; the rest is decided by a clock.
NUMBERS = ("position", "updates", "loss", "losses", "mse_by_timestep", "grad_norm", "learning_rate", "skipped")


@dataclass
class Outcome:
    """What came of one kind of trial.

    Attributes:
        trials: how many were made; `kept`: in how many all was as promised.
        problems: what was not.
        figures: what was measured, for the table and JSON.
        not_run: why it could not be tried here.
    """

    name: str
    trials: int = 0
    kept: int = 0
    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    not_run: str | None = None

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class Setting:
    """What every kind of trial is given: a folder, shards, a seed, when (time.monotonic) to come to an end, and how many trials at most."""

    folder: Path
    shards: Path
    seed: int
    deadline: float
    trials: int

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def share_of_time(self, parts: int) -> "Setting":
        """The same with the first of so many equal parts of the time that is left."""
        now = time.monotonic()
        return dataclasses.replace(self, deadline=now + (self.deadline - now) / parts)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.deadline - time.monotonic():4.0f} s left] {text}", flush=True)


@dataclass
class Whole:
    """An uninterrupted run: its final state, every step's numbers, and how long each moment usually takes."""

    state: dict[str, dict[str, torch.Tensor]]
    records: dict[int, dict[str, Any]]
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """A step's usual time, without saving."""
        return sum(self.seconds[what] for what in TRAINING)

    def differences(self, folder: Path) -> list[str]:
        """Where the run in `folder` differs from it: bits of the final state, numbers of a step."""
        state, told = final_state(folder), numbers(folder)
        found = [
            f"{key} of {name} differs from the uninterrupted run's"
            for key, tensors in self.state.items()
            for name, tensor in tensors.items()
            if not torch.equal(state.get(key, {}).get(name, torch.empty(0)), tensor)
        ]
        found += [f"the record of step {step} differs" for step, record in self.records.items() if told.get(step) != record]
        return found[:5]


def write_config(folder: Path, shards: Path, stage: int, steps: int, every: int = EVERY, **sections: Any) -> Path:
    """The config of a small run in `folder`. Batches are gathered in the training thread, where a kill can hit that."""
    given: dict[str, Any] = {"data": {"threads": 0, "flip": True}, "model": {"depth": 4, "width": 64}, **sections}
    raw = plain_config(folder, shards, deepspeed=zero(stage), training={"steps": steps}, checkpoint={"every": every}, **given)
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return path


def outputs(folder: Path, number: int = 0) -> Path:
    """Where the ranks of a run's start print to."""
    return folder.with_name(f"{folder.name}-out") / f"start-{number:03d}"


def uninterrupted(folder: Path, config: Path) -> Whole:
    """Runs it to its end.

    Raises:
        RuntimeError: it did not reach it.
    """
    start = Start(config, RANKS, outputs(folder))
    ended = start.wait(5 * LIMIT)
    if any(ended.statuses):
        raise RuntimeError(f"the uninterrupted run ended with {ended.statuses}:\n{start.told()}")
    return Whole(final_state(folder), numbers(folder), usual_seconds(start.ranks[0].moments))


def usual_seconds(moments: list[Moment]) -> dict[str, float]:
    """The median time from each moment to the next of its kind: of saving, or of the training thread."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for kind in (True, False):
        each = [moment for moment in moments if (moment.what in SAVING) == kind]
        for moment, after in itertools.pairwise(each):
            found[moment.what].append(after.at - moment.at)
    return {what: statistics.median(seconds) for what, seconds in found.items()}


def final_state(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, moments and averages of the newest checkpoint, each parameter whole."""
    newest, manifest, _ = newest_sound(folder)
    return {key: read_weights(newest, manifest, key) for key in manifest.states}


def numbers(folder: Path) -> dict[int, dict[str, Any]]:
    """The last record of each step, without what a clock decides."""
    return {record["step"]: {name: record.get(name) for name in NUMBERS} for record in records(folder / "metrics.jsonl")}


def newest_step(folder: Path) -> int:
    """The newest committed checkpoint's step, sound or not; 0 where there is none."""
    return max(map(step_of, committed(folder / "checkpoints")), default=0)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else {}
