"""What a comparison found so far: curves, images to each threshold, speed-ups with their intervals, from its folder alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.convergence_folder import Folder, scores_in
from benchmarks.convergence_presets import Group, Preset, Run
from benchmarks.convergence_statistics import Curve, Point, SpeedUp, images_to, mean_of, speed_up, thresholds_of
from benchmarks.convergence_work import UNTRAINED
from fasttrain.sampling.spacing import MOST_NOISE

BEST, FIXED = "best", "fixed"
FASTER, SLOWER, UNDECIDED, OTHER_DIVERGED = "faster", "slower", "undecided", "the other diverged"
NOTHING_LEARNED = 0.75  # of the score before the first step: a last score no better than that counts as divergence
Curves = Mapping[str, Sequence[Curve]]


@dataclass(frozen=True)
class Scored:
    """A whole run.

    Attributes:
        scores: by images, then by weights; not finite where they could not be computed.
        untrained: the score of the network before its first step, where it was taken.
        ended: by divergence, as its training told.
    """

    scores: Mapping[float, Mapping[str, float]]
    untrained: float | None
    ended: bool

    def curve(self, weights: str) -> Curve:
        """Its scores with these weights, or at each point with the best of them.

        It diverged where its training did, or where its last score is not finite, or hardly better than before the first step.
        """
        points = [Point(images, self._score(by_weights, weights)) for images, by_weights in sorted(self.scores.items())]
        last = points[-1].score if points else math.inf
        lost = not math.isfinite(last) or (self.untrained is not None and last >= NOTHING_LEARNED * self.untrained)
        return Curve(tuple(points), self.ended or lost)

    def best_weights(self) -> str | None:
        """Which weights have the last point's best score."""
        if not self.scores:
            return None
        last = self.scores[max(self.scores)]
        return min(last, key=lambda weights: _finite(last[weights]))

    def _score(self, by_weights: Mapping[str, float], weights: str) -> float:
        return _finite(min(map(_finite, by_weights.values())) if weights == BEST else by_weights[weights])


def _finite(score: float | None) -> float:
    return score if score is not None and math.isfinite(score) else math.inf


def scored(folder: Folder, run: Run) -> Scored | None:
    """A run's scores; None while it is not whole."""
    ending, preset = folder.ending(run), folder.preset
    if ending is None:
        return None
    found = scores_in(folder.scores(run))
    scores = {
        float(step * preset.batch): {name: _finite(found[step][name]["frechet_distance"]) for name in preset.score.weights}
        for step in preset.points
        if step in found
    }
    untrained = found.get(0, {}).get(UNTRAINED)
    return Scored(scores, None if untrained is None else untrained["frechet_distance"], ending["diverged"])


def summary(folder: Folder) -> dict[str, Any]:
    """Everything that is whole: seeds of which every arm of a group is done."""
    preset = folder.preset
    groups = {name: group for name in preset.groups if (group := _group(folder, name)) is not None}
    runs = folder.distinct()
    done = [run for run in runs if folder.ending(run) is not None]
    return {
        "runs": len(runs),
        "runs_done": len(done),
        "batch": preset.batch,
        "groups": groups,
        "noise": noise(folder),
        "protocol": _protocol(folder, done),
        "commits": _commits(folder, runs),
        **hours([command for run in (*runs, None) for command in folder.seconds(run)]),
    }


def _group(folder: Folder, name: str) -> dict[str, Any] | None:
    preset = folder.preset
    group = preset.groups[name]
    runs = {seed: {arm: scored(folder, Run(name, arm, seed)) for arm in group.arms} for seed in range(preset.seeds)}
    whole = {seed: _all_there(by_arm) for seed, by_arm in runs.items() if all(by_arm.values())}
    if not whole:
        return None
    by_arm = {arm: [whole[seed][arm] for seed in whole] for arm in group.arms}
    curves = {
        choice: {arm: [run.curve(weights) for run in some] for arm, some in by_arm.items()}
        for choice, weights in ((BEST, BEST), (FIXED, preset.score.fixed))
    }
    return {
        "baseline": group.baseline,
        "contender": group.contender,
        "seeds": list(whole),
        BEST: analysis(preset, group, curves[BEST], preset.batch),
        FIXED: {"weights": preset.score.fixed, **analysis(preset, group, curves[FIXED], preset.batch)},
        "best_weights": {arm: [run.best_weights() for run in some] for arm, some in by_arm.items()},
        "hours": {arm: hours([c for seed in runs for c in folder.seconds(Run(name, arm, seed))]) for arm in group.arms},
        "grids": {arm: _grid(preset, Run(name, arm, 0)) for arm in group.arms},
        "with_more_steps": {arm: _with_more_steps(folder, Run(name, arm, 0)) for arm in group.arms},
    }


def _all_there(by_arm: Mapping[str, Scored | None]) -> dict[str, Scored]:
    return {arm: run for arm, run in by_arm.items() if run is not None}


def _grid(preset: Preset, run: Run) -> dict[str, float]:
    """Where the sampler begins and ends: the schedule's own, so that arms with other schedules are sampled on other grids."""
    smallest, largest = preset.config_of(run).diffusion.schedule.edm_limits
    return {"largest_sigma": min(largest, MOST_NOISE), "smallest_sigma": smallest}


def _with_more_steps(folder: Folder, run: Run) -> float | None:
    """A run's last score with more steps of the sampler, over the score that counts: far from 1, scores judge the sampler."""
    few, many = (_last(folder_of(run), folder.preset) for folder_of in (folder.scores, folder.finely))
    return many / few if few and many else None


def _last(path: Path, preset: Preset) -> float | None:
    """The last score with the fixed weights; None where it was not taken."""
    found = scores_in(path).get(preset.steps, {}).get(preset.score.fixed)
    return None if found is None else found["frechet_distance"]


def analysis(preset: Preset, group: Group, curves: Curves, batch: int) -> dict[str, Any]:
    """Thresholds, speed-ups and final scores of the arms' curves, paired by their places; `batch`: images of a step."""
    over = curves[group.baseline]
    thresholds = thresholds_of(over, preset.steps * batch, preset.thresholds)
    ups = {arm: [speed_up(some, over, threshold) for threshold in thresholds] for arm, some in curves.items()}
    return {
        "thresholds": thresholds,
        "arms": {arm: _arm(some, thresholds, ups[arm]) for arm, some in curves.items()},
        "contender_over": {arm: _duel(curves[group.contender], curves[arm], thresholds) for arm in curves if arm != group.contender},
    }


def _duel(contender: Sequence[Curve], rival: Sequence[Curve], thresholds: Sequence[float]) -> list[dict[str, Any]]:
    ups = [speed_up(contender, rival, threshold) for threshold in thresholds]
    return [{**up.plain(), "verdict": verdict(up, contender, rival)} for up in ups]


def _arm(curves: Sequence[Curve], thresholds: Sequence[float], ups: Sequence[SpeedUp]) -> dict[str, Any]:
    needed = [[images_to(curve, threshold) for curve in curves] for threshold in thresholds]
    finals = [curve.points[-1].score for curve in curves if not curve.diverged]
    mean = mean_of(finals) if finals else None
    return {
        "curves": [[[point.images, _plain(point.score)] for point in curve.points] for curve in curves],
        "diverged": sum(curve.diverged for curve in curves),
        "which_diverged": [curve.diverged for curve in curves],
        "images_to": [[None if span is None else [_plain(end) for end in span] for span in spans] for spans in needed],
        "speed_up": [up.plain() for up in ups],
        "final": None if mean is None else {"mean": mean.value, "interval": mean.interval},
    }


def verdict(up: SpeedUp, contender: Sequence[Curve], rival: Sequence[Curve]) -> str:
    """Whether the contender is shown to need fewer images: its interval, or the safe end of it, lies on one side of 1.

    A contender that diverged in any seed is not to be relied on, however fast it is in the others. One pair shows nothing.
    """
    if lost := sum(curve.diverged for curve in contender):
        return f"diverged in {lost} of {len(contender)} seeds"
    if all(curve.diverged for curve in rival) and up.pairs == 0:
        return OTHER_DIVERGED
    if up.pairs < 2:
        return UNDECIDED
    low, high = up.interval or (up.at_least or 0.0, up.at_most or math.inf)
    return FASTER if low > 1 else SLOWER if high < 1 else UNDECIDED


def noise(folder: Folder) -> dict[str, Any] | None:
    """How much a score moves when only the samples' seed changes: the floor below which no difference of two scores means anything."""
    preset = folder.preset
    name, group = next(iter(preset.groups.items()))
    run = Run(name, group.baseline, 0)
    found = [
        found[preset.steps][preset.score.fixed] for path in sorted(folder.noise(run, 0).parent.glob("*")) if (found := scores_in(path))
    ]
    scores = [score["frechet_distance"] for score in found]
    if len(scores) < 2:
        return None
    deviation = statistics.stdev(map(math.log, scores))
    return {"run": run.name, "step": preset.steps, "weights": preset.score.fixed, "scores": scores, "relative_deviation": deviation}


def _protocol(folder: Folder, done: Sequence[Run]) -> dict[str, Any] | None:
    """The protocol of one score, as `fasttrain evaluate` saved it: all but step, weights and seed is every score's."""
    for run in done:
        for by_weights in scores_in(folder.scores(run)).values():
            return next(iter(by_weights.values()))
    return None


def _commits(folder: Folder, runs: Sequence[Run]) -> list[str | None]:
    """The code that runs were begun and ended with."""
    told = [part for run in runs for part in (folder.begun(run), folder.ending(run)) if part is not None]
    return list(dict.fromkeys(part["commit"] for part in told))


def hours(commands: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What commands took, those that were cut or failed among them: on the clock, of processors, and of GPUs held."""
    return {
        "run_hours": sum(command["seconds"] for command in commands) / 3600,
        "cpu_hours": sum(command["cpu_seconds"] for command in commands) / 3600,
        "gpu_hours": sum(command["seconds"] * command["devices"] for command in commands) / 3600,
        "training_hours": sum(command["seconds"] for command in commands if command["what"] == "train") / 3600,
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
