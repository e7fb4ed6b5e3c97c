"""The README's tables of what is shown without a GPU: machine code read, and errors measured in Triton's interpreter."""

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


def static(results: Path) -> str:
    """Registers, spills, access widths and bytes of every kernel, as its own report lays them out."""
    result = read(results / "cpu" / "static.json")
    if result is None:
        return NOT_RUN
    # Imported here: it needs Triton's compiler, the README's other tables need only their JSON.
    rows = importlib.import_module("benchmarks.static_report").rows(result)
    return "\n".join(table([str(key) for key in rows[0]], [[str(value) for value in row.values()] for row in rows]))
