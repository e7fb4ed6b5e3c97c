"""Checkpoints: every rank's share of the training state in safetensors, committed by one rename, verified before it is trusted.

    RUN/checkpoints/
        step-00001000/
            rank-00000.safetensors ...   see shares.py
            manifest.json                files with sizes and xxh3 digests, shapes, counters, identity of model and data, and its own digest
        latest                           name of the newest one, for people and other tools
        step-00002000.tmp/               one being written (saving.py): plan.json, what it will hold; rank-00000.json ..., the receipts of
                                         shares that are whole

The commit: write into `step-N.tmp`, fsync, digest; all ranks exchange (ok, digest); rank 0 writes the manifest,
fsyncs, renames the folder, fsyncs the parent, and moves the pointer. A reader trusts only a folder whose manifest and digests verify,
and goes backwards until one does. A folder that was cut off just before its rename, every share whole with its receipt, is committed by
the next start.
"""

import json
import os
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import TrainingState
from fasttrain.errors import UserError
from fasttrain.files import sync, whole
from fasttrain.shares import Slices, Written, damage, share_name

FORMAT = 1
MANIFEST, PLAN = "manifest.json", "plan.json"
_NAME = re.compile(r"step-([0-9]{8,18})")
_LARGEST = 1 << 28  # bytes of a manifest: more is none of ours, and is not read

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps tried, skipped ones included.
        position: images drawn.
        updates: steps that changed the weights.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Count
    position: Count
    updates: Count


class Sealed(BaseModel):
    """A JSON file that carries its own digest and is wholly checked when it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def write(self, path: Path) -> None:
        """Writes it durably, with the digest that `unseal` compares."""
        raw = self.model_dump(mode="json")
        write_durably(path, json.dumps({**raw, "xxh3": _content_digest(raw)}, indent=1))

    @classmethod
    def unseal(cls, path: Path) -> Self:
        """Raises OSError or ValueError where there is no sound one."""
        try:
            raw = json.loads(_text(path))
            if not isinstance(raw, dict) or raw.pop("xxh3", None) != _content_digest(raw):
                raise ValueError(f"{path.name} does not match its own digest")
            return cls.model_validate_json(json.dumps(raw))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except RecursionError:
            raise ValueError(f"{path.name} is nested too deeply") from None


class Receipt(Sealed):
    """That a rank's share is whole, and what it is known by."""

    share: Written


class Plan(Sealed):
    """What a checkpoint holds: enough to refuse it by name where it does not fit.

    `timestep_weights` are those that weighting `pareto` has solved for: see pareto_weights.py; `lengths` those in effect: see lengths.py.
    """

    format: int
    progress: Progress
    identity: dict[str, Any]
    shapes: dict[str, list[Annotated[int, Field(gt=0)]]]
    states: list[str]
    world_size: int = Field(gt=0)
    zero_stage: int = Field(ge=0, le=3)
    timestep_weights: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    lengths: dict[str, Annotated[int, Field(gt=0)]] = {}

    @field_validator("format")
    @classmethod
    def _of_this_version(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"{value}, this version reads {FORMAT}")
        return value


class Manifest(Plan):
    """A whole checkpoint: what it holds, and the files that hold it."""

    files: dict[str, Written]

    @model_validator(mode="after")
    def _one_file_a_rank(self) -> Self:
        if len(self.files) != self.world_size or sorted(self.files) != [share_name(rank) for rank in range(self.world_size)]:
            raise ValueError(f"names other files than those of {self.world_size} ranks")
        return self

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises OSError or ValueError where there is no sound manifest."""
        return cls.unseal(folder / MANIFEST)


class Checkpoints:
    """The checkpoints of one run, for all its ranks together."""

    def __init__(self, run_dir: Path, processes: Processes):
        self.folder = run_dir / "checkpoints"
        self._processes = processes

    def newest(self) -> tuple[Path, Manifest, list[str]] | None:
        """The newest checkpoint that verifies, agreed by all ranks, and what was passed over on the way to it. A collective.

        One that was cut off when it was complete but for its rename is committed; others that were never finished are not looked at.
        """
        passed_over: list[str] = []
        for name in self._processes.from_main([str(f) for f in _candidates(self.folder)] if self._processes.is_main else None):
            folder = Path(name)
            manifest, problem = _verify(folder, self._processes.rank, self._processes.world_size)
            problems = [p for p in self._processes.gather(problem) if p]
            if manifest is not None and not problems and (not folder.suffix or self._adopted(folder, manifest)):
                return folder.with_suffix(""), manifest, passed_over
            if not folder.suffix:
                passed_over.append(f"{folder.name}: {problems[0]}")
        if passed_over:
            raise UserError(
                "no checkpoint of this run can be trusted:\n  "
                + "\n  ".join(passed_over)
                + f"\nremove {self.folder} to start again from nothing"
            )
        return None

    def load(self, state: TrainingState, folder: Path, manifest: Manifest) -> None:
        """Fills the training state from a verified checkpoint that fits, of any world size and ZeRO stage. A collective."""
        slices = Slices(folder, list(manifest.files))
        for fragment in state.fragments:
            for key, view in fragment.state.items():
                slices.fill(view, fragment.name, key, fragment.start)
        state.refresh_weights()

    def _adopted(self, partial: Path, manifest: Manifest) -> bool:
        """Whether rank 0 could commit a complete one; where it cannot, the one before serves as well."""
        return self._processes.from_main(commit(partial, manifest) is None if self._processes.is_main else None)


def commit(partial: Path, manifest: Manifest) -> str | None:
    """Makes a checkpoint of a folder whose shares are whole, durably; returns what stood in the way, with nothing changed."""
    final = folder_of(partial.parent, manifest.progress.step)
    try:
        manifest.write(partial / MANIFEST)
        for carried_out in [partial / PLAN, *partial.glob("rank-*.json")]:
            carried_out.unlink(missing_ok=True)
        sync(partial)
        # The pointer's new text is on the disk before the rename: after it, nothing needs room any more.
        with whole(partial.parent / "latest") as pointer:
            write_durably(pointer, final.name + "\n")
            _move_away(final)
            os.rename(partial, final)
            sync(partial.parent)
    except OSError as error:
        return f"rank 0 could not commit {final}: {error.strerror or error}"
    return None


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints in a folder of them, newest first."""
    return sorted((f for f in folder.glob("step-*") if _NAME.fullmatch(f.name) and f.is_dir()), key=step_of, reverse=True)


def lengths_of(run_dir: Path) -> dict[str, int]:
    """The lengths that a run has gone by so far: of its newest checkpoint, one that was cut off just before its rename among them."""
    for folder in _candidates(run_dir / "checkpoints"):
        with suppress(OSError, ValueError):
            return _manifest_of(folder).lengths
    return {}


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is, once it is committed."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(folder.stem.removeprefix("step-"))


def write_durably(path: Path, text: str) -> None:
    """Writes a small file and waits until it is on the disk."""
    path.write_text(text)
    sync(path)


def check_fits(manifest: Manifest, shapes: dict[str, list[int]], states: list[str], folder: Path) -> None:
    """Refuses a checkpoint of another model, naming the first parameter that differs."""
    for name in sorted({*shapes, *manifest.shapes}):
        mine, saved = shapes.get(name), manifest.shapes.get(name)
        if mine != saved:
            raise UserError(
                f"{folder} is of another model: parameter {name} is {saved or 'absent'} there and {mine or 'absent'} in this config; "
                "restore the model section it was trained with, or choose another run_dir"
            )
    if sorted(states) != sorted(manifest.states):
        raise UserError(
            f"{folder} holds the states {manifest.states}, this config wants {states}: "
            "keep optimizer.ema as it was, or choose another run_dir"
        )


def newest_sound(run_dir: Path, before: int | None = None) -> tuple[Path, Manifest, list[str]]:
    """The newest checkpoint of a run that verifies, and what was passed over on the way to it. Needs no process group.

    Args:
        before: only those of earlier steps than this.

    Raises:
        UserError: there is none.
    """
    passed_over: list[str] = []
    for folder in (f for f in committed(run_dir / "checkpoints") if before is None or step_of(f) < before):
        manifest, problem = _verify(folder)
        if manifest is not None and problem is None:
            return folder, manifest, passed_over
        passed_over.append(f"{folder.name}: {problem}")
    if passed_over:
        raise UserError(f"no checkpoint of {run_dir} can be trusted:\n  " + "\n  ".join(passed_over))
    raise UserError(
        f"{run_dir} has no checkpoint yet: let `fasttrain train` reach its first (checkpoint.every), or stop it with Ctrl-C, which saves"
    )


def steps_of(run_dir: Path) -> list[int]:
    """The steps of a run's committed checkpoints, oldest first."""
    return sorted(map(step_of, committed(run_dir / "checkpoints")))


def kept(run_dir: Path, step: int) -> tuple[Path, Manifest]:
    """The checkpoint of this step, verified. Needs no process group.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = folder_of(run_dir / "checkpoints", step)
    if not folder.is_dir():
        there = ", ".join(map(str, steps_of(run_dir))) or "none"
        raise UserError(f"{run_dir} has no checkpoint of step {step}; it has: {there} (checkpoint.keep_every keeps some for good)")
    manifest, problem = _verify(folder)
    if manifest is None or problem is not None:
        raise UserError(f"{folder} is damaged ({problem}): choose another step, one of {', '.join(map(str, steps_of(run_dir)))}")
    return folder, manifest


def read_weights(folder: Path, manifest: Manifest, key: str) -> dict[str, torch.Tensor]:
    """Every parameter whole, fp32, from a verified checkpoint: `key` is "master" or the name of an average. Needs no process group.

    Raises:
        UserError: it keeps no such state.
    """
    if key not in manifest.states:
        raise UserError(f"{folder} keeps no {key!r}; it has: {', '.join(manifest.states)}")
    slices = Slices(folder, list(manifest.files))
    weights = {name: torch.empty(shape) for name, shape in manifest.shapes.items()}
    for name, weight in weights.items():
        slices.fill(weight.view(-1), name, key, 0)
    return weights


def _candidates(folder: Path) -> list[Path]:
    """What may be the newest checkpoint, newest first: the committed ones, and those that were cut off."""
    cut_off = [f for f in folder.glob("step-*.tmp") if _NAME.fullmatch(f.stem) and f.is_dir() and not f.is_symlink()]
    return sorted([*committed(folder), *cut_off], key=lambda f: (step_of(f), not f.suffix), reverse=True)


def _verify(folder: Path, rank: int = 0, world_size: int = 1) -> tuple[Manifest | None, str | None]:
    """The manifest, and what is wrong with it, with this rank's share of the files, or (on rank 0) with the slices in them."""
    try:
        manifest = _manifest_of(folder)
        if manifest.progress.step != step_of(folder):
            return None, f"its manifest is of step {manifest.progress.step}"
        for name in sorted(manifest.files)[rank::world_size]:
            if problem := damage(folder / name, manifest.files[name]):
                return manifest, problem
        return manifest, Slices(folder, list(manifest.files)).problem(manifest.shapes, manifest.states) if rank == 0 else None
    except (OSError, ValueError) as error:
        return None, str(error)


def _manifest_of(folder: Path) -> Manifest:
    """The manifest of a checkpoint; of one that was cut off before it had one, what its plan and receipts say."""
    if not folder.suffix or not (folder / PLAN).exists():
        return Manifest.read(folder)
    plan = Plan.unseal(folder / PLAN)
    receipts = {share_name(rank): Receipt.unseal((folder / share_name(rank)).with_suffix(".json")) for rank in range(plan.world_size)}
    return manifest_of(plan, {name: receipt.share for name, receipt in receipts.items()})


def manifest_of(plan: Plan, files: dict[str, Written]) -> Manifest:
    """The manifest of a plan that was carried out."""
    return Manifest(**dict(plan), files=files)


def _move_away(folder: Path) -> None:
    """Makes way for a checkpoint of the same step (a damaged one, passed over): deleted only when the new one stands."""
    replaced = folder.with_suffix(".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)


def _text(path: Path) -> str:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
        raise ValueError(f"{path.name} is no file of ours")
    return path.read_text()


def _content_digest(raw: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(raw, sort_keys=True).encode())
