"""The trainings and scores of a comparison, in a folder from which it goes on after any end.

WORK/preset.json          what is compared; another comparison is refused
WORK/data, extractor.safetensors   made once
WORK/runs/RUN             a training, until it is scored; removed then
WORK/scores/RUN           what `fasttrain evaluate` wrote: a JSON file for each step and average, its whole protocol within
WORK/noise/RUN/SEED       the same of one point with other seeds of the samples
WORK/spent/RUN.jsonl      seconds of each command that ended
WORK/done/RUN.json        how a run ended: it is whole
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from benchmarks.convergence_presets import Preset, Run
from benchmarks.miniature_runs import CommandFailed, Laboratory
from benchmarks.whole_file import write_json
from fasttrain.checkpoint import steps_of
from fasttrain.errors import Status, UserError

UNTRAINED = "untrained"
SCORED = re.compile(r"step-(?P<step>\d+)-(?P<weights>ema(?:_\d+)?|raw|untrained)-.*\.json")
FIRST_NOISE_SEED = 1000


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

    def spent(self, run: Run) -> Path:
        return self.root / "spent" / f"{run.name}.jsonl"

    def done(self, run: Run) -> Path:
        return self.root / "done" / f"{run.name}.json"

    def ending(self, run: Run) -> dict[str, Any] | None:
        """How a run ended; None while it is not whole."""
        return json.loads(self.done(run).read_text()) if self.done(run).exists() else None

    def seconds(self, run: Run) -> list[dict[str, Any]]:
        """What each command of a run took."""
        return [json.loads(line) for line in self.spent(run).read_text().splitlines()] if self.spent(run).exists() else []

    def begin(self, preset: Preset) -> None:
        """Makes the folder this comparison's.

        Raises:
            UserError: it is another's.
        """
        found, wanted = self.root / "preset.json", preset.plain()
        if not found.exists():
            write_json(found, wanted)
        elif (before := json.loads(found.read_text())) != wanted:
            differing = ", ".join(key for key in wanted if before.get(key) != wanted[key])
            raise UserError(f"{self.root} holds another comparison (it differs in {differing}): give another --work, or remove it")


def scores_in(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """What `fasttrain evaluate` wrote into a folder: by step, then by weights."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("step-*.json")):
        if match := SCORED.fullmatch(path.name):
            found.setdefault(int(match["step"]), {})[match["weights"]] = json.loads(path.read_text())
    return found


class Worker:
    """Does a comparison's work that is not done yet.

    Args:
        lab: runs the commands.
        launcher: see `Laboratory.command`; sampling starts with it too.
        devices: CUDA_VISIBLE_DEVICES of each run that is made at a time; none: CPU.
        keep_runs: trainings are not removed once they are scored.
    """

    def __init__(
        self,
        folder: Folder,
        preset: Preset,
        lab: Laboratory,
        launcher: Sequence[str] = (),
        devices: Sequence[str] = (),
        keep_runs: bool = False,
    ):
        self.folder, self.preset, self.lab = folder, preset, lab
        self.launcher, self.keep_runs = launcher, keep_runs
        self._devices: Queue[str] = Queue()
        for device in devices:
            self._devices.put(device)
        self._on_devices = bool(devices)

    @property
    def data(self) -> str:
        """Where the shards lie."""
        return self.preset.data.train or str(self.folder.root.resolve() / "data")

    @property
    def features(self) -> str:
        """For `fasttrain evaluate`."""
        own = self.preset.score.features
        return f"extractor={self._extractor}" if own == "extractor" else own

    @property
    def _extractor(self) -> Path:
        return self.folder.root.resolve() / "extractor.safetensors"

    def prepare(self) -> None:
        """The shards and the extractor."""
        ready = Path(self.data) / "index.json"
        if self.preset.data.train is None and not ready.exists():
            # What was cut off half-way is made again.
            shutil.rmtree(self.data, ignore_errors=True)
            source, *more = self.preset.data.prepare
            self.lab.command("prepare", source, *more[:1], self.data, *more[1:], about="preparing the data")
        if self.preset.score.features == "extractor" and not self._extractor.exists():
            self.lab.command("evaluate", "train-extractor", self.data, "--out", self._extractor, about="training the extractor")

    def do(self, run: Run) -> None:
        """Trains and scores a run; what is done of it is not done again.

        Raises:
            TimeIsUp: the next call goes on.
            CommandFailed: a command went wrong, but for a training that diverged.
        """
        if self.folder.ending(run) is not None:
            return
        device = self._devices.get() if self._on_devices else None
        try:
            diverged = self._train(run, device)
            self._score(run, device)
            if self._measures_noise(run) and not diverged:
                self._score_noise(run, device)
        finally:
            if device is not None:
                self._devices.put(device)
        self._finish(run, diverged)

    def _train(self, run: Run, device: str | None) -> bool:
        """Trains to the end; whether that was divergence."""
        folder = self.folder.run(run)
        if (folder / "diverged.json").exists():
            return True
        if (folder / "checkpoints").is_dir() and self.preset.steps in steps_of(folder):
            return False
        overrides = [*self.preset.overrides_of(run), f"run_dir={folder.resolve()}", f"data.train={self.data}"]
        try:
            self._command(run, "train", device, "train", self.preset.config, *overrides)
        except CommandFailed as failed:
            if failed.status != Status.DIVERGED:
                raise
            print(f"{run.name}: diverged", flush=True)
            return True
        return False

    def _score(self, run: Run, device: str | None) -> None:
        """Scores every point that was reached with every average, and the network before its first step."""
        there = steps_of(self.folder.run(run))
        found = scores_in(self.folder.scores(run))
        wanted = set(self.preset.score.weights)
        missing = [step for step in self.preset.points if step in there and wanted - found.get(step, {}).keys()]
        first = [] if UNTRAINED in found.get(0, {}) else [UNTRAINED]
        if missing:
            words = ("--weights", *first, *self.preset.score.weights, "--checkpoint-steps", *map(str, missing))
            self._evaluate(run, "score", device, self.folder.scores(run), run.seed, words)

    def _score_noise(self, run: Run, device: str | None) -> None:
        words = ("--weights", self.preset.score.fixed, "--checkpoint-steps", str(self.preset.steps))
        for seed in range(FIRST_NOISE_SEED, FIRST_NOISE_SEED + self.preset.score.noise_seeds):
            out = self.folder.noise(run, seed)
            if not scores_in(out):
                self._evaluate(run, f"noise {seed}", device, out, seed, words)

    def _measures_noise(self, run: Run) -> bool:
        group, baseline = next(iter(self.preset.groups.items()))
        return run == Run(group, baseline.baseline, 0)

    def _evaluate(self, run: Run, what: str, device: str | None, out: Path, seed: int, words: Sequence[str]) -> None:
        score = self.preset.score
        how = {"--count": score.count, "--batch": score.batch, "--steps": score.steps, "--guidance": score.guidance, "--seed": seed}
        given = [part for name, value in how.items() for part in (name, str(value))]
        reference = ("--reference", score.reference or self.data, "--features", self.features, "--out", str(out.resolve()))
        self._command(run, what, device, "evaluate", str(self.folder.run(run).resolve()), *reference, *given, *words)

    def _command(self, run: Run, what: str, device: str | None, *words: str) -> None:
        environment = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        spent = self.lab.command(*words, about=f"{run.name} {what}", launcher=self.launcher, environment=environment)
        line = {"what": what, **spent._asdict(), "devices": 0 if device is None else len(device.split(","))}
        self.folder.spent(run).parent.mkdir(parents=True, exist_ok=True)
        with self.folder.spent(run).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _finish(self, run: Run, diverged: bool) -> None:
        last = max(steps_of(self.folder.run(run)), default=0)
        write_json(self.folder.done(run), {**run._asdict(), "diverged": diverged, "last_step": last})
        if not self.keep_runs:
            shutil.rmtree(self.folder.run(run))
