"""Checkpoints: every rank's share of the training state in safetensors, committed by one rename, verified before it is trusted.

    RUN/checkpoints/
        step-00001000/
            rank-00000.safetensors ...   1-D fp32 slices named `parameter|state|start` (start: index into the flattened parameter)
            manifest.json                files with sizes and xxh3 digests, shapes, counters, identity of model and data, and its own digest
        latest                           name of the newest one, for people and other tools

The commit: write into `step-N.tmp`, fsync, digest; all ranks exchange (ok, digest); rank 0 writes the manifest,
fsyncs, renames the folder, fsyncs the parent, and moves the pointer. A reader trusts only a folder whose manifest and digests verify,
and goes backwards until one does.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import TrainingState
from fasttrain.errors import UserError
from fasttrain.files import digest, sync, whole

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps tried, skipped ones included.
        position: images drawn.
        updates: steps that changed the weights.
    """

    step: int = 0
    position: int = 0
    updates: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: enough to refuse it by name where it does not fit."""

    format: int
    progress: Progress
    identity: dict[str, Any]
    shapes: dict[str, list[int]]
    states: list[str]
    world_size: int
    zero_stage: int
    files: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises OSError or ValueError where there is no sound manifest."""
        raw = json.loads((folder / "manifest.json").read_text())
        try:
            if raw.pop("xxh3") != _content_digest(raw):
                raise ValueError("manifest.json does not match its own digest")
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']!r}, this version reads {FORMAT}")
            return cls(**{**raw, "progress": Progress(**raw["progress"])})
        except (AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"manifest.json is incomplete: {error}") from None

    def write(self, folder: Path) -> None:
        """Writes it durably, with the digest that `read` compares."""
        raw = dataclasses.asdict(self)
        _write_durably(folder / "manifest.json", json.dumps({**raw, "xxh3": _content_digest(raw)}, indent=1))


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, processes: Processes, keep_last: int = 2):
        self.folder = run_dir / "checkpoints"
        self._processes = processes
        self._keep_last = keep_last

    def save(self, state: TrainingState, progress: Progress, identity: dict[str, Any], zero_stage: int) -> Path:
        """Commits a checkpoint of this step. A collective: returns on every rank when it is durable.

        Raises:
            UserError: the state is not finite, or a rank could not write (the checkpoints before it are untouched).
        """
        final = self.folder / f"step-{progress.step:08d}"
        partial = final.with_suffix(".tmp")
        if not self._processes.all(state.is_finite()):
            raise UserError(
                f"the training state at step {progress.step} holds a non-finite value and is not saved; the checkpoint before it stays"
            )
        problems = self._processes.from_main(self._prepare(partial) if self._processes.is_main else [])
        entries: dict[str, dict[str, Any]] = {}
        if not problems:
            entries, problems = self._collect(self._write_share(partial, state))
        if not problems:
            manifest = Manifest(FORMAT, progress, identity, state.shapes, state.keys, self._processes.world_size, zero_stage, entries)
            problems = self._processes.from_main(self._commit(partial, final, manifest) if self._processes.is_main else [])
        if problems:
            if self._processes.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"no checkpoint of step {progress.step} was saved; those before it are intact:\n  " + "\n  ".join(problems))
        return final

    def newest(self) -> tuple[Path, Manifest, list[str]] | None:
        """The newest checkpoint that verifies, agreed by all ranks, and what was passed over on the way to it."""
        passed_over: list[str] = []
        for folder in self._processes.from_main([str(f) for f in _folders(self.folder)] if self._processes.is_main else None):
            manifest, problem = _verify(Path(folder), self._processes.rank, self._processes.world_size)
            problems = [p for p in self._processes.gather(problem) if p]
            if manifest is not None and not problems:
                return Path(folder), manifest, passed_over
            passed_over.append(f"{Path(folder).name}: {problems[0]}")
        if passed_over:
            raise UserError(
                "no checkpoint of this run can be trusted:\n  "
                + "\n  ".join(passed_over)
                + f"\nremove {self.folder} to start again from nothing"
            )
        return None

    def load(self, state: TrainingState, folder: Path, manifest: Manifest) -> None:
        """Fills the training state from a verified checkpoint that fits, of any world size and ZeRO stage. A collective."""
        slices = _Slices(folder, manifest)
        for fragment in state.fragments:
            for key, view in fragment.state.items():
                slices.fill(view, fragment.name, key, fragment.start)
        state.refresh_weights()

    def _prepare(self, partial: Path) -> list[str]:
        """Makes the folder to write into, and takes away what killed saves have left."""
        for unfinished in self.folder.glob("step-*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return [f"rank 0 could not make {partial}: {error.strerror}; make room or mend the disk"]
        return []

    def _write_share(self, partial: Path, state: TrainingState) -> dict[str, Any]:
        path = partial / f"rank-{self._processes.rank:05d}.safetensors"
        tensors = {f"{f.name}|{key}|{f.start}": _copied(view) for f in state.owned() for key, view in f.state.items()}
        try:
            save_file(tensors, path)
            sync(path)
            return {"file": path.name, "bytes": path.stat().st_size, "xxh3": digest(path)}
        except (OSError, SafetensorError) as error:
            return {"problem": f"rank {self._processes.rank} could not write {path}: {error}; make room or mend the disk"}

    def _collect(self, mine: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        shares = self._processes.gather(mine)
        problems = [share["problem"] for share in shares if "problem" in share]
        return {s["file"]: {"bytes": s["bytes"], "xxh3": s["xxh3"]} for s in shares if "file" in s}, problems

    def _commit(self, partial: Path, final: Path, manifest: Manifest) -> list[str]:
        try:
            manifest.write(partial)
            sync(partial)
            # The pointer's new text is on the disk before the rename: after it, nothing needs room any more.
            with whole(self.folder / "latest") as pointer:
                _write_durably(pointer, final.name + "\n")
                _move_away(final)
                os.rename(partial, final)
                sync(self.folder)
        except OSError as error:
            return [f"rank 0 could not commit {final}: {error}; make room or mend the disk"]
        self._forget_before(final)
        return []

    def _forget_before(self, newest: Path) -> None:
        """Keeps the last k up to this one. Later steps do not count: they were passed over, and must not push out what can be trusted."""
        sound = [folder for folder in _folders(self.folder) if folder.name <= newest.name]
        for old in [*sound[self._keep_last :], *self.folder.glob("*.replaced")]:
            shutil.rmtree(old, ignore_errors=True)


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


def newest_sound(run_dir: Path) -> tuple[Path, Manifest, list[str]]:
    """The newest checkpoint of a run that verifies, and what was passed over on the way to it. Needs no process group.

    Raises:
        UserError: there is none.
    """
    passed_over: list[str] = []
    for folder in _folders(run_dir / "checkpoints"):
        manifest, problem = _verify(folder)
        if manifest is not None and problem is None:
            return folder, manifest, passed_over
        passed_over.append(f"{folder.name}: {problem}")
    if passed_over:
        raise UserError(f"no checkpoint of {run_dir} can be trusted:\n  " + "\n  ".join(passed_over))
    raise UserError(
        f"{run_dir} has no checkpoint yet: let `fasttrain train` reach its first (checkpoint.every), or stop it with Ctrl-C, which saves"
    )


def read_weights(folder: Path, manifest: Manifest, key: str) -> dict[str, torch.Tensor]:
    """Every parameter whole, fp32, from a verified checkpoint: `key` is "master" or the name of an average. Needs no process group.

    Raises:
        UserError: it keeps no such state.
    """
    if key not in manifest.states:
        raise UserError(f"{folder} keeps no {key!r}; it has: {', '.join(manifest.states)}")
    slices = _Slices(folder, manifest)
    weights = {name: torch.empty(shape) for name, shape in manifest.shapes.items()}
    for name, weight in weights.items():
        slices.fill(weight.view(-1), name, key, 0)
    return weights


def _folders(folder: Path) -> list[Path]:
    """The committed checkpoints, newest first."""
    return sorted((f for f in folder.glob("step-*") if f.is_dir() and not f.suffix), reverse=True)


def _verify(folder: Path, rank: int = 0, world_size: int = 1) -> tuple[Manifest | None, str | None]:
    """The manifest, and what is wrong with it or with this rank's share of the files."""
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError) as error:
        return None, str(error)
    for name in sorted(manifest.files)[rank::world_size]:
        if problem := _damage(folder / name, manifest.files[name]):
            return manifest, problem
    return manifest, None


class _Slices:
    """Every slice in a checkpoint's files, found by parameter and state."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._files = {name: safe_open(folder / name, framework="pt") for name in manifest.files}
        self._index: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for name, file in self._files.items():
            for tensor in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                parameter, key, start = tensor.rsplit("|", 2)
                (numel,) = file.get_slice(tensor).get_shape()
                self._index.setdefault((parameter, key), []).append((int(start), numel, name, tensor))

    def fill(self, view: torch.Tensor, parameter: str, key: str, start: int) -> None:
        """Copies elements [start, start + len(view)) of a parameter's state into `view`."""
        filled = 0
        for at, numel, name, tensor in self._index.get((parameter, key), []):
            low, high = max(start, at), min(start + view.numel(), at + numel)
            if low < high:
                view[low - start : high - start] = self._files[name].get_slice(tensor)[low - at : high - at].to(view.device)
                filled += high - low
        if filled != view.numel():
            raise UserError(f"the checkpoint lacks {view.numel() - filled} elements of {parameter} ({key}); use another one")


def _copied(view: torch.Tensor) -> torch.Tensor:
    """On the CPU and with memory of its own: views of one flat buffer cannot be written as they are."""
    return torch.empty_like(view, device="cpu").copy_(view)


def _move_away(folder: Path) -> None:
    """Makes way for a checkpoint of the same step (a damaged one, passed over): deleted only when the new one stands."""
    replaced = folder.with_suffix(".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)


def _damage(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    if size != entry["bytes"]:
        return f"{path.name} has {size} bytes instead of {entry['bytes']}"
    return None if digest(path) == entry["xxh3"] else f"{path.name} does not match its digest"


def _content_digest(raw: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(raw, sort_keys=True).encode())


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)
