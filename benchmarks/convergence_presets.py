"""What a comparison of convergence is: its arms, seeds, budget, points and score, as a YAML file under benchmarks/presets or anywhere."""

import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.environment import ROOT
from fasttrain.config import RunConfig, load_config
from fasttrain.errors import UserError
from fasttrain.plain_yaml import read_yaml

FOLDER = Path(__file__).resolve().parent / "presets"
MORE_STEPS = 4  # times the sampler's steps: what a last score is with far less error of the sampler
FILES = ("images", "reference", "features")  # what a preset may leave to the command line, as {images} and so on


class Section(BaseModel):
    """A part of a preset: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(Section):
    """How samples are judged.

    Attributes:
        features: what `fasttrain evaluate --features` takes; `extractor` alone is a classifier trained first, on the training set.
        reference: what it takes for `--reference`; null: the training set.
        weights: the averages (and `raw`) among which a point's score is the lowest. fixed: the one that is reported beside it.
        count, batch, guidance: samples of a score, samples at once, scale of guidance.
        sampler: its name and parameters, as `--sampler` takes them. steps: its steps; `MORE_STEPS` times as many must change little.
        noise_seeds: the first run's last score is taken again with so many other seeds of the samples.
    """

    features: str = "pixels"
    reference: str | None = None
    weights: tuple[str, ...] = ("ema",)
    fixed: str = "ema"
    count: int = Field(gt=1)
    batch: int = Field(default=250, gt=0)
    sampler: tuple[str, ...] = Field(default=("dpm_solver",), min_length=1)
    steps: int = Field(gt=0)
    guidance: float = 1.0
    noise_seeds: int = Field(default=0, ge=0)


class Data(Section):
    """The shards: `train` where they lie, or the words that follow `fasttrain prepare` to make them."""

    train: str | None = None
    prepare: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if (self.train is None) == (not self.prepare):
            raise ValueError("either train, the folder of shards, or prepare, the words behind `fasttrain prepare` that make them")
        return self


class Group(Section):
    """Arms that are compared with each other, and what they have in common.

    Attributes:
        baseline: the arm whose curve decides the thresholds, and whose images the others' are counted by.
        contender: the arm that is expected to be the fastest.
        overrides: of the config, as on the command line. arms: those of each.
    """

    baseline: str
    contender: str
    overrides: tuple[str, ...] = ()
    arms: dict[str, tuple[str, ...]]

    @model_validator(mode="after")
    def _check(self) -> "Group":
        for role in ("baseline", "contender"):
            if getattr(self, role) not in self.arms:
                raise ValueError(f"{role} {getattr(self, role)!r} is none of the arms: {', '.join(self.arms)}")
        return self


class Run(NamedTuple):
    """One training of the comparison."""

    group: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """As what is printed of it begins."""
        return re.sub(r"[^\w.]+", "-", f"{self.group} {self.arm} {self.seed}")


class Preset(Section):
    """A whole comparison.

    Attributes:
        config: a run's config. overrides: for every arm.
        seeds: paired: seed s draws the same images, noise, timesteps, initial weights and samples in every arm.
        steps: of each training. points: the steps after which samples are scored.
        thresholds: the fractions of the budget at which every run of a baseline has reached a threshold.
    """

    about: str
    config: str
    data: Data
    overrides: tuple[str, ...] = ()
    seeds: int = Field(gt=0)
    steps: int = Field(gt=0)
    points: tuple[int, ...] = Field(min_length=1)
    thresholds: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    score: Score
    groups: dict[str, Group] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "Preset":
        if list(self.points) != sorted(set(self.points)) or self.points[0] < 1 or self.points[-1] != self.steps:
            raise ValueError(f"points must rise from 1 or more to steps ({self.steps}), got {list(self.points)}")
        if self.score.fixed not in self.score.weights:
            raise ValueError(f"score.fixed {self.score.fixed!r} is none of score.weights: {', '.join(self.score.weights)}")
        if not all(0 < fraction <= 1 for fraction in self.thresholds):
            raise ValueError(f"thresholds are fractions of the budget, above 0 and up to 1, got {list(self.thresholds)}")
        return self

    def runs(self) -> Iterator[Run]:
        """Every training, all arms of a seed before the next seed: what is done first can be compared first."""
        for seed in range(self.seeds):
            for name, group in self.groups.items():
                yield from (Run(name, arm, seed) for arm in group.arms)

    def overrides_of(self, run: Run) -> list[str]:
        """What a training's command line adds to the config, but for its folders."""
        group = self.groups[run.group]
        saved = {"steps": self.steps, "seed": run.seed, "every": self.save_every, "keep": math.gcd(*self.points)}
        fixed = "seed={seed} training.steps={steps} checkpoint.every={every} checkpoint.keep_every={keep} sampling.every=null"
        return [*self.overrides, *group.overrides, *group.arms[run.arm], *fixed.format(**saved).split()]

    @cached_property
    def save_every(self) -> int:
        """Steps between saves: as the config wants it, so that every point is among them."""
        return math.gcd(load_config(ROOT / self.config, self.overrides).checkpoint.every, *self.points)

    def config_of(self, run: Run) -> RunConfig:
        """A training's config.

        Raises:
            UserError: it does not load; names the arm.
        """
        try:
            return load_config(ROOT / self.config, self.overrides_of(run))
        except UserError as error:
            raise UserError(f"arm {run.group} {run.arm}: {error}") from None

    def identity(self, run: Run) -> dict[str, Any]:
        """All that decides a run's scores, as JSON holds it: its config, the points, and how these are scored."""
        if run not in self._identities:
            score = self.score.model_dump(mode="json", exclude={"fixed", "noise_seeds"})
            self._identities[run] = {"config": self.config_of(run).plain(), "points": list(self.points), "score": score}
        return self._identities[run]

    @cached_property
    def _identities(self) -> dict[Run, dict[str, Any]]:
        """Loaded once: configs are read from files."""
        return {}

    @cached_property
    def batch(self) -> int:
        """Images of a step."""
        return self.config_of(next(self.runs())).training.global_batch

    def filled(self, files: dict[str, str | None]) -> "Preset":
        """With the command line's files in their places.

        Raises:
            UserError: one is missing.
        """
        return Preset.model_validate(_filled(self.model_dump(), {name: files.get(name) for name in FILES}))

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return self.model_dump(mode="json")


def _filled(value: Any, files: dict[str, str | None]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part, files) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_filled(part, files) for part in value]
    for name, file in files.items():
        if isinstance(value, str) and f"{{{name}}}" in value:
            if file is None:
                raise UserError(f"this comparison needs --{name}: give the file or folder")
            value = value.replace(f"{{{name}}}", file)
    return value


def names() -> list[str]:
    """The comparisons that come with the repository."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_preset(name: str | Path) -> Preset:
    """A comparison by its name, or from a YAML file.

    Raises:
        UserError: no such preset, or mistakes in it, each with its path.
    """
    path = FOLDER / f"{name}.yaml" if str(name) in names() else Path(name)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"no preset and no file {name}; presets: {', '.join(names())}") from None
    except ValueError as error:
        raise UserError(f"{path} is not plain YAML: {error}") from None
    try:
        return Preset.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}:\n" + "\n".join(_mistakes(error))) from None


def _mistakes(error: ValidationError) -> Sequence[str]:
    return [f"  {'.'.join(map(str, mistake['loc']))}: {mistake['msg'].removeprefix('Value error, ')}" for mistake in error.errors()]
