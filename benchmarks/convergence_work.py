"""The trainings and scores of a comparison, done one command at a time; what its folder holds is not done again."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

from benchmarks.convergence_folder import Folder, scores_in
from benchmarks.convergence_presets import MORE_STEPS, Run
from benchmarks.environment import commit
from benchmarks.miniature_runs import CommandFailed, Laboratory, NotDone, Spent, TimeIsUp
from benchmarks.whole_file import write_json
from fasttrain.checkpoint import steps_of
from fasttrain.errors import Status

UNTRAINED = "untrained"
FIRST_NOISE_SEED = 1000
DONE, CUT, FAILED = "done", "cut", "failed"  # how a command ended


class Worker:
    """Does a comparison's work that is not done yet.

    Args:
        lab: runs the commands.
        launcher: see `Laboratory.command`; sampling starts with it too.
        devices: CUDA_VISIBLE_DEVICES of each run that is made at a time; none: no GPU is seen.
        keep_runs: trainings are not removed once they are scored.
    """

    def __init__(
        self,
        folder: Folder,
        lab: Laboratory,
        launcher: Sequence[str] = (),
        devices: Sequence[str] = (),
        keep_runs: bool = False,
    ):
        self.folder, self.preset, self.lab = folder, folder.preset, lab
        self.launcher, self.keep_runs = launcher, keep_runs
        self._all_devices = ",".join(devices)
        self._free: Queue[str] = Queue()
        for device in devices:
            self._free.put(device)

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
            self._command(None, "prepare", self._all_devices, "prepare", source, *more[:1], self.data, *more[1:])
        if self.preset.score.features == "extractor" and not self._extractor.exists():
            words = ("evaluate", "train-extractor", self.data, "--out", str(self._extractor))
            self._command(None, "train the extractor", self._all_devices, *words)

    def do(self, run: Run) -> None:
        """Trains and scores a run; what is done of it is not done again.

        Raises:
            TimeIsUp: the next call goes on.
            CommandFailed: a command went wrong, but for a training that diverged.
        """
        if self.folder.ending(run) is None:
            self.folder.begin_run(run)
            with self._device() as device:
                diverged = self._train_and_score(run, device)
            last = max(steps_of(self.folder.run(run)), default=0)
            write_json(self.folder.done(run), {"diverged": diverged, "last_step": last, "commit": commit()})
        # Of a run that is whole too: a kill may have come between its last line and this one.
        if not self.keep_runs and self.folder.run(run).exists():
            shutil.rmtree(self.folder.run(run))

    @contextmanager
    def _device(self) -> Iterator[str]:
        """The GPUs of one run; none where none are given."""
        device = self._free.get() if self._all_devices else ""
        try:
            yield device
        finally:
            if device:
                self._free.put(device)

    def _train_and_score(self, run: Run, device: str) -> bool:
        """Whether it diverged."""
        diverged = self._train(run, device)
        self._score(run, device)
        if self._measures_noise(run) and not diverged:
            self._score_noise(run, device)
        if run.seed == 0 and not diverged:
            self._score_finely(run, device)
        return diverged

    def _train(self, run: Run, device: str) -> bool:
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

    def _score(self, run: Run, device: str) -> None:
        """Scores every point that was reached with every average, and the network before its first step."""
        there = steps_of(self.folder.run(run))
        found = scores_in(self.folder.scores(run))
        wanted = set(self.preset.score.weights)
        missing = [step for step in self.preset.points if step in there and wanted - found.get(step, {}).keys()]
        first = [] if UNTRAINED in found.get(0, {}) else [UNTRAINED]
        if missing:
            words = ("--weights", *first, *self.preset.score.weights, "--checkpoint-steps", *map(str, missing))
            self._evaluate(run, "score", device, self.folder.scores(run), run.seed, words)

    def _score_noise(self, run: Run, device: str) -> None:
        words = ("--weights", self.preset.score.fixed, "--checkpoint-steps", str(self.preset.steps))
        for seed in range(FIRST_NOISE_SEED, FIRST_NOISE_SEED + self.preset.score.noise_seeds):
            out = self.folder.noise(run, seed)
            if not scores_in(out):
                self._evaluate(run, f"noise {seed}", device, out, seed, words)

    def _score_finely(self, run: Run, device: str) -> None:
        """The last score with `MORE_STEPS` times the steps: what of the score is the sampler's error and not the network's."""
        out = self.folder.finely(run)
        if not scores_in(out):
            words = ("--weights", self.preset.score.fixed, "--checkpoint-steps", str(self.preset.steps))
            self._evaluate(run, "more steps", device, out, run.seed, words, MORE_STEPS)

    def _measures_noise(self, run: Run) -> bool:
        group, baseline = next(iter(self.preset.groups.items()))
        return run == Run(group, baseline.baseline, 0)

    def _evaluate(self, run: Run, what: str, device: str, out: Path, seed: int, words: Sequence[str], times: int = 1) -> None:
        score = self.preset.score
        how = {"--count": score.count, "--batch": score.batch, "--steps": times * score.steps, "--guidance": score.guidance, "--seed": seed}
        given = ["--sampler", *score.sampler, *(part for name, value in how.items() for part in (name, str(value)))]
        reference = ("--reference", score.reference or self.data, "--features", self.features, "--out", str(out.resolve()))
        self._command(run, what, device, "evaluate", str(self.folder.run(run).resolve()), *reference, *given, *words)

    def _command(self, run: Run | None, what: str, device: str, *words: str) -> None:
        """Runs a command that sees these GPUs alone, and writes what it took, however it ends; no run: for all of them."""
        about, launcher = (what, ()) if run is None else (f"{run.name} {what}", self.launcher)
        try:
            spent = self.lab.command(*words, about=about, launcher=launcher, environment={"CUDA_VISIBLE_DEVICES": device})
        except NotDone as error:
            self._add_seconds(run, what, device, error.spent, CUT if isinstance(error, TimeIsUp) else FAILED)
            raise
        self._add_seconds(run, what, device, spent, DONE)

    def _add_seconds(self, run: Run | None, what: str, device: str, spent: Spent, ended: str) -> None:
        devices = len(device.split(",")) if device else 0
        if spent.seconds:  # what was not begun took nothing
            self.folder.add_seconds(run, {"what": what, "ended": ended, **spent._asdict(), "devices": devices})
