"""Where a comparison's trainings and scores lie: the folder from which it goes on after any end, and whose it is.

WORK/lock                 held by the harness that works here
WORK/preset.json          what is compared; another comparison is refused
WORK/data, extractor.safetensors   made once
WORK/arms/RUN.json        the whole config of a run as it was begun, and the code's commit; an arm that has become another is refused
WORK/runs/RUN             a training, until it is scored; removed then
WORK/scores/RUN           what `fasttrain evaluate` wrote: a JSON file for each step and average, its whole protocol within
WORK/noise/RUN/SEED       the same of one point with other seeds of the samples
WORK/finely/RUN           the same of an arm's first run's last point with more steps of the sampler
WORK/spent/RUN.jsonl      seconds of each command, however it ended; not of those that were killed with the harness
WORK/spent/shared.jsonl   the same of what all runs need
WORK/done/RUN.json        how a run ended: it is whole
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.convergence_presets import Preset, Run
from benchmarks.environment import commit
from benchmarks.whole_file import write_json
from fasttrain.errors import UserError

SCORED = re.compile(r"step-(?P<step>\d+)-(?P<weights>ema(?:_\d+)?|raw|untrained)-.*\.json")
SHARED = "shared"  # what all runs need; no run has this name, since a run's ends with its seed


@dataclass(frozen=True)
class Folder:
    """Where a comparison's files lie."""

    root: Path

    def run(self, run: Run) -> Path:
        return self.root / "runs" / run.name

    def scores(self, run: Run) -> Path:
        return self.root / "scores" / run.name

    def noise(self, run: Run, seed: int) -> Path:
        return self.root / "noise" / run.name / str(seed)

    def finely(self, run: Run) -> Path:
        return self.root / "finely" / run.name

    def spent(self, run: Run | None) -> Path:
        return self.root / "spent" / f"{SHARED if run is None else run.name}.jsonl"

    def arm(self, run: Run) -> Path:
        return self.root / "arms" / f"{run.name}.json"

    def done(self, run: Run) -> Path:
        return self.root / "done" / f"{run.name}.json"

    def ending(self, run: Run) -> dict[str, Any] | None:
        """How a run ended; None while it is not whole."""
        return _read(self.done(run))

    def begun(self, run: Run) -> dict[str, Any] | None:
        """The config and the commit that a run was begun with; None before that."""
        return _read(self.arm(run))

    def seconds(self, run: Run | None) -> list[dict[str, Any]]:
        """What each command of a run took, or of what all runs need."""
        return [json.loads(line) for line in self.spent(run).read_text().splitlines()] if self.spent(run).exists() else []

    def add_seconds(self, run: Run | None, command: Mapping[str, Any]) -> None:
        """Adds what a command took."""
        self.spent(run).parent.mkdir(parents=True, exist_ok=True)
        with self.spent(run).open("a") as file:
            file.write(json.dumps(command) + "\n")

    def begin(self, preset: Preset) -> None:
        """Makes the folder this comparison's. Every arm's config is loaded, so that a mistake in one is told before any work.

        Raises:
            UserError: it is another's, or an arm's config has changed since it was begun, or does not load.
        """
        self._check_preset(preset.plain())
        configs = {run: preset.config_of(run).plain() for run in preset.runs()}
        for run, config in configs.items():
            self._check_arm(run, config)
        write_json(self.root / "preset.json", preset.plain())

    def begin_run(self, run: Run, preset: Preset) -> None:
        """Keeps what a run is made of, before its first step."""
        if not self._holds(run):
            write_json(self.arm(run), {"config": preset.config_of(run).plain(), "commit": commit()})

    def _holds(self, run: Run) -> bool:
        """Whether anything of a run was made."""
        return self.done(run).exists() or (self.run(run) / "checkpoints").exists()

    def _check_preset(self, wanted: Mapping[str, Any]) -> None:
        before = _read(self.root / "preset.json")
        if before is not None and before != wanted:
            differing = ", ".join(key for key in wanted if before.get(key) != wanted[key])
            raise UserError(f"{self.root} holds another comparison (it differs in {differing}): give another --work, or remove it")

    def _check_arm(self, run: Run, config: Mapping[str, Any]) -> None:
        if not self._holds(run):
            return
        begun = self.begun(run)
        if begun is None:
            raise UserError(f"{self.root} does not tell the config of arm {run.group} {run.arm}: give another --work, or remove it")
        if change := _first_change(begun["config"], config):
            key, was, now = change
            raise UserError(
                f"{self.root}: arm {run.group} {run.arm} was made with {key} {was}, and its config has {now} now: "
                "give another --work, or the config as it was"
            )


def _first_change(was: Any, now: Any, path: str = "") -> tuple[str, str, str] | None:
    """The first key in which two configs differ, and what each has there."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            if change := _first_change(was.get(key), now.get(key), f"{path}.{key}" if path else key):
                return change
        return None
    return None if was == now else (path, json.dumps(was), json.dumps(now))


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Keeps a folder for this process, until it ends however it ends.

    Raises:
        UserError: another harness works there, or nothing can be written there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"--work {root}: cannot write there: {error.strerror}") from None
    try:
        _lock(descriptor, root)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another harness works in {root}: wait for its end, or give another --work") from None
    except OSError as error:
        print(f"{root} cannot be locked ({error.strerror}): nothing keeps a second harness from it", flush=True)


def scores_in(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """What `fasttrain evaluate` wrote into a folder: by step, then by weights."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("step-*.json")):
        if match := SCORED.fullmatch(path.name):
            found.setdefault(int(match["step"]), {})[match["weights"]] = json.loads(path.read_text())
    return found
