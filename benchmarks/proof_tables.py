"""The README's tables of what is shown without a GPU: machine code read, errors in Triton's interpreter, the noise's statistics."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from fasttrain_kernels.cases import CASES

from benchmarks.tables import read, table

NOT_RUN = "*Not run.*"


def errors(results: Path) -> str:
    """Of each operation the largest share of its error budget in each type, over all settings, batches, outputs and gradients."""
    parts = []
    for path in sorted(results.glob("*/errors.json")):
        result = read(path)
        assert result is not None
        parts.append(f"Kernels run {result['kernels_run']} ({path.parent.name}):\n\n" + "\n".join(_shares(result)))
    return "\n\n".join(parts) or NOT_RUN


def _shares(result: dict[str, Any]) -> list[str]:
    worst: defaultdict[str, dict[str, float]] = defaultdict(dict)
    counted: defaultdict[str, int] = defaultdict(int)
    for row in result["rows"]:
        share = max(row["error"][kind] / row["budget"][kind] for kind in ("largest", "mean"))
        kept = worst[row["operation"]]
        kept[row["dtype"]] = max(kept.get(row["dtype"], 0.0), share)
        counted[row["operation"]] += 1
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["rows"]))
    rows = [[name, str(counted[name]), *(f"{100 * kept[d]:.0f} %" if d in kept else "" for d in dtypes)] for name, kept in worst.items()]
    return table(["operation", "tensors", *(f"{dtype}, share of the budget" for dtype in dtypes)], rows)


def noise(results: Path) -> str:
    """The noise's statistics: how far each figure is from what normal and independent numbers give, and how far it may be."""
    result = read(results / "cpu" / "noise.json")
    if result is None:
        return NOT_RUN
    pairs = [figure for figure in result["figures"] if figure["name"].startswith(("values, ", "squares, "))]
    alone = [figure for figure in result["figures"] if figure not in pairs]
    furthest = max(pairs, key=lambda figure: abs(figure["deviation"]) / figure["limit"])
    rows = [_deviation(figure, figure["name"]) for figure in alone]
    rows.append(_deviation(furthest, f"the furthest of {len(pairs)} correlations: {furthest['name']}"))
    same = result["integers"]
    about = f"{result['settings']['draws']:,} numbers of the reference; of {same['integers']:,} integers from torch and from Triton "
    return "\n".join(
        [f"{about}({same['kernels_run']}) {same['different']} differ.", "", *table(["", "figure", "deviation", "limit"], rows)]
    )


def _deviation(figure: dict[str, Any], name: str) -> list[str]:
    return [name, f"{figure['value']:.4g}", f"{figure['deviation']:.2f}", f"{figure['limit']:.3g}"]


def static(results: Path) -> str:
    """Of each operation's first setting at width 1152, or what goes with it, on sm_90: what its main kernel is in machine code."""
    result = read(results / "cpu" / "static.json")
    if result is None:
        return NOT_RUN
    settings = {
        name: ({key: str(value) for key, value in case.options[0].items()}, list(case.real[min(2, len(case.real) - 1)]))
        for name, case in CASES.items()
    }
    shown = [one for one in result["passes"] if settings[one["operation"]] == (one["options"], one["sample"])]
    low, high = map(str, result["settings"]["batches"])
    head = [
        "operation",
        "pass",
        "registers",
        "spills",
        "16-byte accesses, and others",
        "bytes an element",
        "least",
        f"sums at {low} / {high}",
    ]
    return "\n".join(table(head, [_static(one, low, high) for one in shown]))


def _static(one: dict[str, Any], low: str, high: str) -> list[str]:
    code, size = one["kernels"][0]["machine_code"], one["bytes_per_element"]
    wide = sum(count for name, count in code["sm_90"]["accesses"].items() if name.endswith(".128"))
    others = sum(code["sm_90"]["accesses"].values()) - wide
    # Spills of all targets and of the pass's second kernel too: there must be none anywhere.
    spilled = sum(made["spilled_bytes"] for each in one["kernels"] for made in each["machine_code"].values())
    sums = [one["at_batch"][batch]["partial_sums"] for batch in (low, high)]
    return [
        f"`{one['operation']}`",
        one["direction"] if CASES[one["operation"]].differentiable else "",
        str(code["sm_90"]["registers"]),
        str(spilled),
        f"{wide}, {others}",
        f"{size['in_bulk']:.4g}",
        f"{size['minimum']:.4g}",
        f"{sums[0]:.2f} / {sums[1]:.2f}" if any(sums) else "",
    ]
