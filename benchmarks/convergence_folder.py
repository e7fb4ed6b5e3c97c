"""Where trainings and scores lie: the folder from which a comparison goes on after any end, and which others may share.

A run is known by what it is, not by its arm's name: KEY is a digest of its whole config, its points and how they are scored. So comparisons
of one data set share what they have in common, an arm can be added, and a config that has changed is another run.

WORK/lock                 held by the harness that works here
WORK/data.json            of which data; others are refused
WORK/data, extractor.safetensors   made once
WORK/arms/KEY.json        what the digest is of, whose arm it was first, and the code's commit
WORK/runs/KEY             a training, until it is scored; removed then
WORK/scores/KEY           what `fasttrain evaluate` wrote: a JSON file for each step and average, its whole protocol within
WORK/noise/KEY/SEED       the same of one point with other seeds of the samples
WORK/finely/KEY           the same of an arm's first run's last point with more steps of the sampler
WORK/spent/KEY.jsonl      seconds of each command, however it ended; not of those that were killed with the harness
WORK/spent/shared.jsonl   the same of what all runs need
WORK/done/KEY.json        how a run ended: it is whole
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

import xxhash

from benchmarks.convergence_presets import Preset, Run
from benchmarks.environment import commit
from benchmarks.whole_file import write_json
from fasttrain.errors import UserError

SCORED = re.compile(r"step-(?P<step>\d+)-(?P<weights>ema(?:_\d+)?|raw|untrained)-.*\.json")
SHARED = "shared"  # what all runs need; no key is a word


@dataclass(frozen=True)
class Folder:
    """Where the files of a comparison's runs lie."""

    root: Path
    preset: Preset

    def run(self, run: Run) -> Path:
        return self.root / "runs" / self._key(run)

    def scores(self, run: Run) -> Path:
        return self.root / "scores" / self._key(run)

    def noise(self, run: Run, seed: int) -> Path:
        return self.root / "noise" / self._key(run) / str(seed)

    def finely(self, run: Run) -> Path:
        return self.root / "finely" / self._key(run)

    def spent(self, run: Run | None) -> Path:
        return self.root / "spent" / f"{SHARED if run is None else self._key(run)}.jsonl"

    def arm(self, run: Run) -> Path:
        return self.root / "arms" / f"{self._key(run)}.json"

    def done(self, run: Run) -> Path:
        return self.root / "done" / f"{self._key(run)}.json"

    def ending(self, run: Run) -> dict[str, Any] | None:
        """How a run ended; None while it is not whole."""
        return _read(self.done(run))

    def begun(self, run: Run) -> dict[str, Any] | None:
        """What a run is, and the commit that it was begun with; None before that."""
        return _read(self.arm(run))

    def seconds(self, run: Run | None) -> list[dict[str, Any]]:
        """What each command of a run took, or of what all runs need."""
        return [json.loads(line) for line in self.spent(run).read_text().splitlines()] if self.spent(run).exists() else []

    def add_seconds(self, run: Run | None, command: Mapping[str, Any]) -> None:
        """Adds what a command took."""
        self.spent(run).parent.mkdir(parents=True, exist_ok=True)
        with self.spent(run).open("a") as file:
            file.write(json.dumps(command) + "\n")

    def distinct(self) -> list[Run]:
        """The comparison's runs, of equal ones the first."""
        return list({self._key(run): run for run in reversed(list(self.preset.runs()))}.values())[::-1]

    def begin(self) -> None:
        """Makes the folder this data set's. Every arm's config is loaded, so that a mistake in one is told before any work.

        Raises:
            UserError: it holds another's, or an arm's config does not load.
        """
        for run in self.preset.runs():
            self.preset.config_of(run)
        wanted, path = self.preset.data.model_dump(mode="json"), self.root / "data.json"
        before = _read(path)
        if before is not None and before != wanted:
            raise UserError(f"{self.root} holds runs on other data ({json.dumps(before)}): give another --work, or remove it")
        write_json(path, wanted)

    def begin_run(self, run: Run) -> None:
        """Keeps what a run is, before its first step."""
        if not self.arm(run).exists():
            write_json(self.arm(run), {**run._asdict(), **self.preset.identity(run), "commit": commit()})

    def _key(self, run: Run) -> str:
        return xxhash.xxh3_64_hexdigest(json.dumps(self.preset.identity(run), sort_keys=True).encode())


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
