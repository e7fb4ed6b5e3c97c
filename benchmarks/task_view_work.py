"""What the multi-task view is measured on and with: networks, analyses, and the folder from which the measuring goes on after any end.

WORK/lock             held by the harness that works here
WORK/plan.json        what is trained and measured; another plan is refused, but for more seeds
WORK/data             digits
WORK/runs/RUN         a network, with its checkpoints at the points
WORK/found/JOB        what `fasttrain analyse` wrote: a JSON file and its pictures
WORK/spent.jsonl      seconds of each command, however it ended; not of those that were killed with the harness
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.miniature_runs import Laboratory, NotDone, Spent, TimeIsUp, overrides, side_by_side
from benchmarks.whole_file import write_json
from fasttrain.checkpoint import folder_of, steps_of
from fasttrain.errors import UserError

CONFIG = "configs/digits/convergence.yaml"
CLAIMED = ("const", "snr", "max_snr", "min_snr")  # what figure 4 compares, and what networks are trained with
BASELINE, CONTENDER = "const", "min_snr"
UNTRAINED = "untrained"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of what a command starts


@dataclass(frozen=True)
class Plan:
    """What is trained and measured.

    Attributes:
        seeds: networks of each weighting. steps: of their training. ranges: equal ranges of timesteps, of all analyses.
        samples: of a range's gradient; fine-tuning is judged by half as many, loss landscapes by an eighth.
        images: of each network for consistency, a multiple of the ten classes.
        weights: which of a network's weights gradients are taken on; raw are those that training takes its own on.
        regularisations: lambda of equation 11, in units of the mean squared gradient.
    """

    seeds: int = 3
    steps: int = 1024
    ranges: int = 10
    samples: int = 2048
    images: int = 100
    weights: str = "raw"
    regularisations: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.steps < 16 or self.steps % 16:
            raise UserError(f"--seeds must be positive and --steps a multiple of 16, got {self.seeds} and {self.steps}")
        if self.samples < 16 or self.samples % 16:
            raise UserError(f"--samples must be a multiple of 16, got {self.samples}")

    @property
    def points(self) -> tuple[int, int, int]:
        """Steps after which networks are looked at: early, middle, late."""
        return self.steps // 16, self.steps // 4, self.steps

    @property
    def counts(self) -> list[int]:
        """Samples a range among which UGD's stability is compared: 8 to 512 of 2,048."""
        return sorted({max(2, self.samples // part) for part in (256, 64, 16, 4)})

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**dataclasses.asdict(self), "regularisations": list(self.regularisations)}


class Network(NamedTuple):
    """One training."""

    weighting: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.weighting}-{self.seed}"


class Job(NamedTuple):
    """One analysis: its folder's name, `fasttrain analyse KIND`, the networks it is of, and its other words."""

    name: str
    kind: str
    networks: tuple[Network, ...]
    words: tuple[str, ...]


def networks_of(plan: Plan) -> list[Network]:
    """All trainings, seed by seed."""
    return [Network(weighting, seed) for seed in range(plan.seeds) for weighting in CLAIMED]


def pareto_jobs(plan: Plan, network: Network) -> list[Job]:
    """Figure 4 at each point; before the first step all networks of a seed are one, which counts with the baseline's."""
    how = ("--ranges", str(plan.ranges), "--samples", str(plan.samples), "--lambda", *map(str, plan.regularisations))
    points = [(step, ("--weights", plan.weights, "--checkpoint-step", str(step))) for step in plan.points]
    first = [(0, ("--weights", UNTRAINED))] if network.weighting == BASELINE else []
    return [Job(f"pareto-{network.name}-{step}", "pareto", (network,), (*how, *at)) for step, at in [*first, *points]]


def other_jobs(plan: Plan) -> Iterator[Job]:
    """Everything beside figure 4, on networks at the end of their training."""
    for seed in range(plan.seeds):
        yield from _seed_jobs(plan, Network(BASELINE, seed), Network(CONTENDER, seed))
    every = tuple(networks_of(plan))
    yield Job("consistency", "consistency", every, ("--count", str(plan.images), "--sampler", "heun", "--steps", "30"))
    if plan.seeds > 1:
        yield _line(plan, "interpolate-seeds", Network(CONTENDER, 0), Network(CONTENDER, 1))
    yield _line(plan, "interpolate-weightings", Network(CONTENDER, 0), Network(BASELINE, 0))


def _seed_jobs(plan: Plan, baseline: Network, contender: Network) -> Iterator[Job]:
    seed, fewer = baseline.seed, str(plan.samples // 8)
    ranges, on = ("--ranges", str(plan.ranges)), ("--weights", plan.weights)
    tuning = ("--samples", str(plan.samples // 2), "--steps", str(max(1, plan.steps // 5)))
    yield Job(f"finetune-{seed}", "finetune", (baseline,), (*ranges, *tuning))
    yield Job(f"instability-{seed}", "instability", (contender,), (*ranges, *on, "--counts", *map(str, plan.counts)))
    for network in (baseline, contender):
        how = ("--samples", fewer, "--steps", "30", "--vectors", "2")
        yield Job(f"hessian-{network.name}", "hessian", (network,), how)
    yield Job(f"ranges-{seed}", "ranges", tuple(Network(weighting, seed) for weighting in CLAIMED), ())
    yield _line(plan, f"interpolate-{UNTRAINED}-{seed}", contender, None)


def _line(plan: Plan, name: str, network: Network, other: Network | None) -> Job:
    """The loss from another network to this one, or from its own beginning; `do` puts the other's folder behind its words."""
    networks = (network,) if other is None else (network, other)
    return Job(name, "interpolate", networks, ("--samples", str(plan.samples // 8)))


@dataclass(frozen=True)
class Folder:
    """Where the measuring's files lie."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def spent(self) -> Path:
        return self.root / "spent.jsonl"

    def run(self, network: Network) -> Path:
        return self.root / "runs" / network.name

    def result(self, job: Job) -> Path:
        """The JSON file that the job leaves, last of all but its pictures."""
        return self.root / "found" / job.name / f"{job.kind}.json"

    def read(self, job: Job) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.result(job).read_text())
        return found

    def words(self, job: Job) -> list[str]:
        """What follows `fasttrain`."""
        first, *others = [str(self.run(network)) for network in job.networks]
        of = [first, *(["--other"] if others and job.kind == "interpolate" else []), *others]
        return ["analyse", job.kind, *of, *job.words, "--out", str(self.result(job).parent)]

    def seconds(self) -> list[dict[str, Any]]:
        """What each command took."""
        return [json.loads(line) for line in self.spent.read_text().splitlines()] if self.spent.exists() else []

    def begin(self, plan: Plan) -> None:
        """Makes the folder this plan's.

        Raises:
            UserError: it is another's.
        """
        path = self.root / "plan.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        if differing := [key for key, value in before.items() if key != "seeds" and value != plan.plain()[key]]:
            told = ", ".join(f"{key} {before[key]}" for key in differing)
            raise UserError(f"--work {self.root} was begun with {told}: give the same, or another --work")
        write_json(path, plan.plain())


@dataclass
class Worker:
    """Trains and measures what the folder does not hold."""

    lab: Laboratory
    folder: Folder
    plan: Plan

    def run(self, workers: int) -> None:
        """Everything, so many commands at a time.

        Raises:
            TimeIsUp: the next call goes on.
            CommandFailed: a command went wrong.
        """
        self.folder.begin(self.plan)
        if not (self.folder.data / "index.json").exists():
            shutil.rmtree(self.folder.data, ignore_errors=True)  # what was cut off half-way is made again
            self._command("prepare", ["prepare", "digits", str(self.folder.data)])
        side_by_side([partial(self._network, network) for network in networks_of(self.plan)], workers)
        side_by_side([partial(self._analyse, job) for job in other_jobs(self.plan)], workers)

    def _network(self, network: Network) -> None:
        run = self.folder.run(network)
        if not (run / "checkpoints").is_dir() or self.plan.steps not in steps_of(run):
            self._command(f"train {network.name}", ["train", CONFIG, *self._overrides(network)])
        for step in set(steps_of(run)) - set(self.plan.points):
            shutil.rmtree(folder_of(run / "checkpoints", step))
        for job in pareto_jobs(self.plan, network):
            self._analyse(job)

    def _overrides(self, network: Network) -> Sequence[str]:
        """Checkpoints as often as the first point, so that all points are among them."""
        first = self.plan.points[0]
        return overrides(
            run_dir=self.folder.run(network),
            data__train=self.folder.data,
            seed=network.seed,
            diffusion__weighting=network.weighting,
            training__steps=self.plan.steps,
            checkpoint__every=first,
            checkpoint__keep_every=first,
            log__every=self.plan.steps // 16,
            log__timestep_ranges=self.plan.ranges,
            log__tensorboard="false",
        )

    def _analyse(self, job: Job) -> None:
        if not self.folder.result(job).exists():
            self._command(job.name, self.folder.words(job))

    def _command(self, what: str, words: Sequence[str]) -> None:
        """Runs a command, and keeps what it took, however it ended."""
        try:
            spent, ended = self.lab.command(*words, about=what, environment=ONE_THREAD), "done"
        except NotDone as error:
            self._keep(what, error.spent, "cut" if isinstance(error, TimeIsUp) else "failed")
            raise
        self._keep(what, spent, ended)

    def _keep(self, what: str, spent: Spent, ended: str) -> None:
        if spent.seconds:  # what was not begun took nothing
            with self.folder.spent.open("a") as file:
                file.write(json.dumps({"what": what, "ended": ended, **spent._asdict()}) + "\n")
