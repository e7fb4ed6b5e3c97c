"""What the multi-task view came to: figure 4 over networks and seeds, and a few figures of every other analysis.

A mean over seeds is that of logarithms where quotients are averaged, and plain elsewhere, with Student's t-interval (95 %), which one
seed does not have.
"""

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.convergence_statistics import mean_of
from benchmarks.task_view_work import (
    BASELINE,
    CLAIMED,
    CONTENDER,
    UNTRAINED,
    Folder,
    Job,
    Network,
    Plan,
    networks_of,
    other_jobs,
    pareto_jobs,
)

SOLVED = ("optimum (frank_wolfe)", "ugd")
LAST = 4  # reports at the end of training that are a loss by range: a quarter of them
DISTANCES = ("itself", "next to it", "two away", "three and more away")  # in ranges, from the one that is trained on

Result = dict[str, Any]


def summary(folder: Folder, plan: Plan) -> Result:
    """Everything, of a folder that holds everything."""
    found: dict[str, list[tuple[Job, Result]]] = defaultdict(list)
    for job in other_jobs(plan):
        found[job.kind].append((job, folder.read(job)))
    groups = pareto(folder, plan)
    return {
        "pareto": {"groups": groups, "claim": claim(groups)},
        "finetune": finetune([result for _, result in found["finetune"]]),
        "instability": instability([result for _, result in found["instability"]]),
        "ranges": ranges([result for _, result in found["ranges"]]),
        "consistency": consistency(networks_of(plan), found["consistency"][0][1]),
        "interpolate": {job.name.removeprefix("interpolate-"): interpolated(result) for job, result in found["interpolate"]},
        "hessian": hessian([(job.networks[0], result) for job, result in found["hessian"]]),
        "hours": hours(folder.seconds()),
    }


def pareto(folder: Folder, plan: Plan) -> list[Result]:
    """Figure 4 of the networks of one training weighting and step, over their seeds; the untrained ones first."""
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for network in networks_of(plan):
        for job in pareto_jobs(plan, network):
            found = folder.read(job)
            step = found["checkpoint_step"]
            groups[network.weighting if step else UNTRAINED, step].append(found)
    order = [UNTRAINED, *CLAIMED]
    return [group(trained, step, groups[trained, step]) for trained, step in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))]


def group(trained: str, step: int, found: Sequence[Result]) -> Result:
    """One training weighting and step: each lambda over the seeds."""
    rows = zip(*(result["by_lambda"] for result in found), strict=True)
    return {
        "trained": trained,
        "step": step,
        "networks": len(found),
        "noise_share": statistics.fmean(_noise_share(result) for result in found),
        "by_lambda": [by_lambda(seeds) for seeds in rows],
    }


def _noise_share(found: Result) -> float:
    """What of the mean squared gradient is noise."""
    squares = [row[k] for k, row in enumerate(found["gram"])]
    return sum(square * share for square, share in zip(squares, found["noise_shares"], strict=True)) / sum(squares)


def by_lambda(seeds: Sequence[Result]) -> Result:
    """One lambda: every weighting's objective in units of the least one, which is nearest, and how far the contender is from the others."""
    weightings = [seed["weightings"] for seed in seeds]
    names = [name for name in weightings[0] if all(name in of for of in weightings)]
    fixed = [name for name in names if name not in SOLVED]
    return {
        "lambda": seeds[0]["lambda"],
        "times_least": {name: quotients([of[name]["times_least"] for of in weightings]) for name in names},
        "distance": {name: statistics.fmean(of[name]["distance"] for of in weightings) for name in names},
        "nearest": [nearest(of, CLAIMED, "objective") for of in weightings],
        "nearest_of_all": [nearest(of, fixed, "objective") for of in weightings],
        "nearest_without_noise": [nearest(of, CLAIMED, "without_noise") for of in weightings],
        "over_best_other": quotients([over_best_other(of) for of in weightings]),
    }


def nearest(weightings: Mapping[str, Mapping[str, float]], names: Sequence[str], key: str) -> str:
    """The weighting of the least objective among these."""
    return min(names, key=lambda name: float(weightings[name][key]))


def over_best_other(weightings: Mapping[str, Mapping[str, float]]) -> float:
    """Min-SNR's objective over the least of the others that the paper compares: below 1, it is the nearest to the optimum."""
    least = min(float(weightings[name]["objective"]) for name in CLAIMED if name != CONTENDER)
    return float(weightings[CONTENDER]["objective"]) / least if least > 0 else math.inf


def claim(groups: Sequence[Result]) -> list[Result]:
    """For each lambda: in how many networks Min-SNR is the nearest of the four, in all and by what they were trained with."""
    told = []
    for rows in zip(*(of["by_lambda"] for of in groups), strict=True):
        by_trained: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for of, row in zip(groups, rows, strict=True):
            by_trained[of["trained"]][0] += row["nearest"].count(CONTENDER)
            by_trained[of["trained"]][1] += len(row["nearest"])
        told.append(
            {
                "lambda": rows[0]["lambda"],
                "nearest": sum(count for count, _ in by_trained.values()),
                "without_noise": sum(row["nearest_without_noise"].count(CONTENDER) for row in rows),
                "networks": sum(networks for _, networks in by_trained.values()),
                "by_trained": dict(by_trained),
                "winners": dict(Counter(itertools.chain.from_iterable(row["nearest"] for row in rows)).most_common()),
                "winners_of_all": dict(Counter(itertools.chain.from_iterable(row["nearest_of_all"] for row in rows)).most_common()),
            }
        )
    return told


def finetune(found: Sequence[Result]) -> Result:
    """Figure 2: the change of each range's loss by what was trained on; and all of them by how far away they are."""
    by_distance: dict[str, list[tuple[float, int]]] = {name: [] for name in DISTANCES}
    for row in (row for result in found for row in result["tuned"]):
        for number, (change, verdict) in enumerate(zip(row["change"], row["better_or_worse"], strict=True)):
            by_distance[DISTANCES[min(abs(number - row["range"]), len(DISTANCES) - 1)]].append((change, verdict))
    tuned = [
        {"range": rows[0]["range"], "change": [means([row["change"][k] for row in rows]) for k in range(len(rows[0]["change"]))]}
        for rows in zip(*(result["tuned"] for result in found), strict=True)
    ]
    return {
        "names": found[0]["names"],
        "tuned": tuned,
        "by_distance": {name: _counted(changes) for name, changes in by_distance.items() if changes},
    }


def _counted(changes: Sequence[tuple[float, int]]) -> Result:
    verdicts = [verdict for _, verdict in changes]
    return {
        "change": statistics.fmean(change for change, _ in changes),
        "better": verdicts.count(-1),
        "worse": verdicts.count(1),
        "of": len(verdicts),
    }


def instability(found: Sequence[Result]) -> list[Result]:
    """Figure 3 and the supplement's figure 8: how far repeated solutions lie apart, and what a step with them costs, by samples."""
    return [
        {
            "samples_per_range": rows[0]["samples_per_range"],
            "spread": means([row["spread"] for row in rows]),
            "times_a_plain_step": quotients([row["times_a_plain_step"] for row in rows]),
        }
        for rows in zip(*(result["counts"] for result in found), strict=True)
    ]


def ranges(found: Sequence[Result]) -> Result:
    """Figure 6: each weighting's unweighted training loss over the baseline's, by range, over the last quarter of training."""
    names = list(next(iter(found[0]["runs"].values()))["curves"])
    ends = [{run["weighting"]["name"]: _ends(run) for run in result["runs"].values()} for result in found]
    return {
        weighting: {name: quotients([of[weighting][name] / of[BASELINE][name] for of in ends]) for name in names}
        for weighting in CLAIMED
        if weighting != BASELINE
    }


def _ends(run: Result) -> dict[str, float]:
    return {name: statistics.fmean(curve["mse"][-LAST:]) for name, curve in run["curves"].items()}


def consistency(networks: Sequence[Network], found: Result) -> Result:
    """PSNR in dB from the same noise, and how much of it other noise does not give: by what a pair of networks shares."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (i, first), (j, second) in itertools.combinations(enumerate(networks), 2):
        pairs[_shared(first, second)].append((found["same"][i][j]["value"], found["gain"][i][j]["value"]))
    return {
        shared: {"psnr": statistics.fmean(p for p, _ in values), "gain": statistics.fmean(g for _, g in values), "pairs": len(values)}
        for shared, values in pairs.items()
    }


def _shared(first: Network, second: Network) -> str:
    if first.seed == second.seed:
        return "other weighting, same seed"
    return "same weighting, other seed" if first.weighting == second.weighting else "other weighting and seed"


def interpolated(found: Result) -> Result:
    """The barrier on the line between two networks, and in units of the mean loss of its ends."""
    profile = found["profiles"]["training"]
    loss = dict(zip(profile["at"], profile["loss"], strict=True))
    ends = [float(loss[0.0]), float(loss[1.0])]
    return {
        "from": found["from"],
        "to": found["to"],
        "losses": ends,
        "barrier": float(profile["barrier"]),
        "of_ends": float(profile["barrier"]) / statistics.fmean(ends),
        "lowest_at": profile["lowest_at"],
    }


def hessian(found: Iterable[tuple[Network, Result]]) -> Result:
    """The spectrum's ends by training weighting; each is of that weighting's own loss."""
    by_weighting: dict[str, list[Result]] = defaultdict(list)
    for network, result in found:
        by_weighting[network.weighting].append(result)
    return {
        weighting: {
            "highest": means([result["highest"][0]["value"] for result in results]),
            "lowest": means([result["lowest"][0]["value"] for result in results]),
            "trace": means([result["trace"]["value"] for result in results]),
            "negative_share": means([result["negative_share"] for result in results]),
        }
        for weighting, results in by_weighting.items()
    }


def hours(commands: Iterable[Result]) -> dict[str, float]:
    """Hours of commands by their kind, those that were cut off included."""
    found: dict[str, float] = defaultdict(float)
    for command in commands:
        found[command["what"].replace(" ", "-").partition("-")[0]] += command["seconds"] / 3600
    return {kind: round(value, 4) for kind, value in found.items()}


def means(values: Sequence[float]) -> Result:
    """The values, their mean and its interval; what is not finite has neither."""
    if not all(map(math.isfinite, values)):
        return {"values": [value if math.isfinite(value) else None for value in values], "mean": None, "interval": None}
    mean = mean_of(values)
    return {"values": list(values), "mean": mean.value, "interval": mean.interval and list(mean.interval)}


def quotients(values: Sequence[float]) -> Result:
    """The same of quotients, on their logarithms."""
    given = [float(value) for value in values]
    if not all(math.isfinite(value) and value > 0 for value in given):
        return {"values": [value if math.isfinite(value) else None for value in given], "mean": None, "interval": None}
    mean = mean_of([math.log(value) for value in given])
    interval = mean.interval and [math.exp(end) for end in mean.interval]
    return {"values": given, "mean": math.exp(mean.value), "interval": interval}
