"""The README's tables of what is shown without a GPU: machine code read, errors in Triton's interpreter, the noise's statistics."""

import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

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
    """Registers, spills, access widths and bytes of every kernel, as its own report lays them out."""
    result = read(results / "cpu" / "static.json")
    if result is None:
        return NOT_RUN
    # Imported here: it needs Triton's compiler, the README's other tables need only their JSON.
    rows = importlib.import_module("benchmarks.static_report").rows(result)
    return "\n".join(table([str(key) for key in rows[0]], [[str(value) for value in row.values()] for row in rows]))
