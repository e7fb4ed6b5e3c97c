"""The table, the verdicts and the picture of the multi-task view, from its JSON."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import read, table
from benchmarks.task_view_work import BASELINE, CONTENDER, UNTRAINED
from fasttrain.charts import Line, Panel, line_chart

Result = dict[str, Any]
Rows = tuple[list[str], list[list[str]]]
NAME = "task_view"
DRAWN = ("const", "snr", "max_snr", "min_snr", "soft_min_snr", "p2", "ugd")
MIDDLE = 0.1  # the lambda at which training steps are compared


def task_view(results: Path) -> str:
    """README's: Min-SNR against the others by network and lambda, then what every other analysis found."""
    result = read(results / "cpu" / f"{NAME}.json")
    if result is None:
        return "*Not run.*"
    picture = (results / "cpu" / f"{NAME}.png").relative_to(results.parent.parent).as_posix()
    shown = [*table(*pareto_rows(result)), "", *table(*claim_rows(result)), "", *table(*other_rows(result))]
    return "\n".join([told(result), "", *shown, "", f"![Objective of weightings, instability of UGD, loss by range]({picture})"])


def told(result: Result) -> str:
    """What the first table holds, in one sentence."""
    settings, groups = result["settings"], result["pareto"]["groups"]
    noisiest = max(group["noise_share"] for group in groups)
    how = f"{settings['weights']} weights, {settings['ranges']} ranges of {settings['samples']:,} samples"
    return (
        "Objective of equation 11: Min-SNR's over the least of const's, SNR's and max-SNR's, below 1 where Min-SNR is the nearest to the "
        f"optimum. Mean over {settings['seeds']} seeds, 95 % interval, and in how many networks it is the nearest (digits, x0, {how}; "
        f"at most {noisiest:.0%} of the mean squared gradient is noise):"
    )


def pareto_rows(result: Result) -> Rows:
    """A row a training weighting and step, a column a lambda."""
    groups = result["pareto"]["groups"]
    rows = [[_network(group), *(_against(row) for row in group["by_lambda"])] for group in groups]
    return ["trained with", *(f"lambda {row['lambda']:g}" for row in groups[0]["by_lambda"])], rows


def _network(group: Result) -> str:
    return UNTRAINED if group["trained"] == UNTRAINED else f"{group['trained']}, {group['step']:,} steps"


def _against(row: Result) -> str:
    wins, networks = row["nearest"].count(CONTENDER), len(row["nearest"])
    return f"{with_interval(row['over_best_other'])}, {wins} of {networks}"


def claim_rows(result: Result) -> Rows:
    """A row a lambda: in how many networks which weighting is the nearest."""
    rows = []
    for row in result["pareto"]["claim"]:
        of = row["networks"]
        rows.append([f"{row['lambda']:g}", f"{row['nearest']} of {of}", f"{row['without_noise']} of {of}", *map(_winners, _both(row))])
    return ["lambda", "Min-SNR nearest of the four", "the same without noise", "nearest of the four", "nearest of all"], rows


def _both(row: Result) -> tuple[dict[str, int], dict[str, int]]:
    return row["winners"], row["winners_of_all"]


def _winners(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def verdict(result: Result) -> list[str]:
    """The paper's claim, plainly: a line a lambda, and whether it holds everywhere."""
    rows, lines = result["pareto"]["claim"], []
    for row in rows:
        where = ", ".join(f"{trained} {count} of {of}" for trained, (count, of) in row["by_trained"].items())
        wins = f"{row['nearest']} of {row['networks']} networks"
        lines.append(f"lambda {row['lambda']:g}: Min-SNR is the nearest of the four in {wins} ({where})")
    everywhere = _lambdas([row for row in rows if row["nearest"] == row["networks"]])
    nowhere = _lambdas([row for row in rows if not row["nearest"]])
    return [*lines, f"it is so in every network at lambda {everywhere}, in no network at lambda {nowhere}"]


def _lambdas(rows: Sequence[Result]) -> str:
    return ", ".join(f"{row['lambda']:g}" for row in rows) or "(none)"


def other_rows(result: Result) -> Rows:
    """A row an analysis: the figures that matter."""
    rows = [
        [f"figure 2: change of the x0 loss after training on one range alone, network of {BASELINE}", finetune_words(result["finetune"])],
        ["figure 3: how far UGD's weights of repeated estimates lie apart (0: equal, 1: disjoint)", spread_words(result["instability"])],
        ["supplement, figure 8: a step with UGD, in steps without", cost_words(result["instability"])],
        *([f"figure 6: {name}'s unweighted loss over {BASELINE}'s, by range", range_words(by)] for name, by in result["ranges"].items()),
        ["images from the same noise, PSNR (above that of other noise)", consistency_words(result["consistency"])],
        ["barrier on the straight line between networks, in their mean loss", barrier_words(result["interpolate"])],
        ["Hessian of the weighted loss", hessian_words(result["hessian"])],
    ]
    return ["analysis", "found"], rows


def finetune_words(found: Result) -> str:
    return "; ".join(
        f"{where} {100 * row['change']:+.1f} % (better in {row['better']}, worse in {row['worse']} of {row['of']})"
        for where, row in found["by_distance"].items()
    )


def spread_words(found: Sequence[Result]) -> str:
    return ", ".join(f"{with_interval(row['spread'])} from {row['samples_per_range']} samples a range" for row in found)


def cost_words(found: Sequence[Result]) -> str:
    return ", ".join(f"{row['times_a_plain_step']['mean']:.3g} with {row['samples_per_range']} samples a range" for row in found)


def range_words(by_range: Result) -> str:
    return ", ".join(f"{name}: {with_interval(ratio)}" for name, ratio in by_range.items())


def consistency_words(found: Result) -> str:
    return ", ".join(f"{shared} {row['psnr']:.1f} dB ({row['gain']:+.1f})" for shared, row in found.items())


def barrier_words(found: Result) -> str:
    begun = [row["of_ends"] for name, row in found.items() if name.startswith(UNTRAINED)]
    others = [row for name, row in found.items() if not name.startswith(UNTRAINED)]
    words = [f"at most {max(begun):.3g} from before the first step to the end of training ({len(begun)} networks)"]
    return "; ".join([*words, *(f"{row['of_ends']:.3g} from {row['from']}, to {row['to']}" for row in others)])


def hessian_words(found: Result) -> str:
    return "; ".join(
        f"{weighting}: eigenvalues {row['lowest']['mean']:.3g} to {with_interval(row['highest'])}, trace {row['trace']['mean']:.3g}"
        for weighting, row in found.items()
    )


def with_interval(found: Result) -> str:
    """0.85 (0.8 to 0.91)."""
    if found["mean"] is None:
        return "not finite"
    ends = found["interval"]
    return f"{found['mean']:.3g}" + (f" ({ends[0]:.3g} to {ends[1]:.3g})" if ends else "")


def draw(path: Path, result: Result) -> None:
    """Figure 4 by training weighting, the claim over training, and figures 3, 8 and 6; bands are the least and the most of the seeds."""
    groups, steps = result["pareto"]["groups"], result["settings"]["steps"]
    panels = [_objectives(group) for group in groups if group["step"] in (0, steps)]
    panels += [_over_training(groups), *_of_ugd(result["instability"]), _by_range(result["ranges"]), _tuned(result["finetune"])]
    line_chart(path, "The multi-task view on digits, x0: bands from the least to the most over the seeds", panels, columns=3)


def _objectives(group: Result) -> Panel:
    rows = [row for row in group["by_lambda"] if row["lambda"] > 0] or group["by_lambda"]
    lines = [_line(name, [(row["lambda"], row["times_least"][name]) for row in rows]) for name in DRAWN if name in rows[0]["times_least"]]
    return Panel(f"objective of equation 11, {_network(group)}", lines, "lambda", "times the least", log_x=True, log_y=True)


def _over_training(groups: Sequence[Result]) -> Panel:
    """Untrained networks have no place on a logarithmic axis of steps."""
    given = [row["lambda"] for row in groups[0]["by_lambda"]]
    place = min(range(len(given)), key=lambda k: abs(given[k] - MIDDLE))
    trained = dict.fromkeys(group["trained"] for group in groups if group["step"])
    lines = [
        _line(name, [(g["step"], g["by_lambda"][place]["over_best_other"]) for g in groups if g["trained"] == name]) for name in trained
    ]
    return Panel(
        f"Min-SNR's over the best other's by what was trained with, lambda {given[place]:g}",
        lines,
        "steps",
        "below 1: nearest",
        log_x=True,
        log_y=True,
    )


def _of_ugd(found: Sequence[Result]) -> Iterable[Panel]:
    apart = _line("ugd", [(row["samples_per_range"], row["spread"]) for row in found])
    cost = _line("ugd", [(row["samples_per_range"], row["times_a_plain_step"]) for row in found])
    yield Panel("how far UGD's repeated solutions lie apart", [apart], "samples a range", "0: equal, 1: disjoint", log_x=True)
    yield Panel("a step with UGD", [cost], "samples a range", "times a plain step", log_x=True, log_y=True)


def _by_range(found: Result) -> Panel:
    lines = [_line(name, list(zip(_middles(by), by.values(), strict=True))) for name, by in found.items()]
    return Panel(f"unweighted loss over {BASELINE}'s, end of training", lines, "t / T", log_y=True)


def _tuned(found: Result) -> Panel:
    names = found["names"]
    lines = [
        _line(f"trained on {names[row['range']]}", list(zip(_middles(names), row["change"], strict=True)), 100.0) for row in found["tuned"]
    ]
    return Panel("change of the x0 loss by training on one range", lines, "t / T", "%")


def _middles(names: Iterable[str]) -> list[float]:
    count = len(list(names))
    return [(k + 0.5) / count for k in range(count)]


def _line(name: str, points: Iterable[tuple[float, Result]], times: float = 1.0) -> Line:
    """Means, and the band of their values; what is not finite is left out."""
    kept = [(x, found) for x, found in points if found["mean"] is not None and math.isfinite(found["mean"])]
    band = [(x, times * min(found["values"]), times * max(found["values"])) for x, found in kept]
    return Line(name, [(x, times * found["mean"]) for x, found in kept], band)
