"""How far every kernel is from the truth, beside what it may be off by: for every operation, option, type and batch.

    python -m benchmarks.error_report                prints a table, writes benchmarks/results/<device>/errors.json
    python -m benchmarks.error_report adaln noising  these operations anew, the others as the file has them

Truth is the reference in float64; the budget twice plain PyTorch's own error in the same type, and a small floor (tests/kernels/calls.py).
Kernels run on the GPU if there is one, and in Triton's interpreter elsewhere. The exit status is 1 if a budget is exceeded.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.cases import CASES, Case
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, results_folder
from benchmarks.whole_file import write_json
from tests.kernels.calls import budget, errors, in_float64, results
from tests.kernels.interpreter import interpreting

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCHES = (1, 2, 5)

Row = dict[str, Any]


def measure(case: Case, options: dict[str, Any], dtype: torch.dtype, batch: int, device: torch.device) -> Iterator[Row]:
    """Each output's and each gradient's largest and mean error and what they may be."""
    inputs = case.inputs((batch, *case.sample), dtype, device)
    with kernels_on(device):
        kernel = results(case.call, inputs, case, impl="triton", **options)
    plain = results(case.reference, inputs, case, **options)
    truth = results(case.reference, in_float64(inputs), case, **options)
    outputs = len(kernel) - len(case.differentiable)
    names = [*(f"output {index}" for index in range(outputs)), *(f"gradient of {name}" for name in case.differentiable)]
    for name, ours, theirs, exact in zip(names, kernel, plain, truth, strict=True):
        found, allowed = errors(ours, exact), budget(theirs, exact, drawn="seed" in inputs)
        within = bool(torch.isfinite(ours).all()) and found.largest <= allowed.largest and found.mean <= allowed.mean
        yield {"tensor": name, "error": found._asdict(), "budget": allowed._asdict(), "within": within}


def kernels_on(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cuda" else interpreting()


def measured(operation: str, device: torch.device) -> Iterator[Row]:
    """One operation in every setting, type and batch."""
    case = CASES[operation]
    for options in case.options:
        for dtype in DTYPES:
            for batch in BATCHES:
                key = {"operation": operation, "options": {name: str(value) for name, value in options.items()}}
                size = {"dtype": dtype, "shape": [batch, *case.sample]}
                for row in measure(case, options, DTYPES[dtype], batch, device):
                    yield {**key, **size, **row}


def report(device: torch.device, console: Console, operations: Sequence[str], kept: list[Row]) -> Row:
    """These operations anew, beside what is kept of others, as plain values for JSON."""
    found = {name: [row for row in kept if row["operation"] == name] for name in CASES}
    for operation in operations:
        found[operation] = list(measured(operation, device))
        console.print(f"{operation}: {len(found[operation])} tensors")
    how = "natively" if device.type == "cuda" else "in Triton's interpreter"
    told = {"benchmark": "errors", "environment": environment(device), "kernels_run": how}
    return {**told, "rows": [row for each in found.values() for row in each]}


def share(row: Row) -> float:
    """The part of its budget that a tensor's error takes, the worse of largest and mean."""
    return max(row["error"][kind] / row["budget"][kind] for kind in ("largest", "mean"))


def rows(result: Row) -> list[Row]:
    """For a table: of each operation, option and type the tensor that takes most of its budget, over all batches."""
    worst: dict[tuple[str, ...], Row] = {}
    for row in result["rows"]:
        key = (row["operation"], *row["options"].values(), row["dtype"])
        if key not in worst or share(row) > share(worst[key]):
            worst[key] = row
    return [
        {
            "operation": " ".join([row["operation"], *row["options"].values()]),
            "type": row["dtype"],
            "tensor": row["tensor"],
            "batch": row["shape"][0],
            "largest error": f"{row['error']['largest']:.2e}",
            "may be": f"{row['budget']['largest']:.2e}",
            "mean error": f"{row['error']['mean']:.2e}",
            "mean may be": f"{row['budget']['mean']:.2e}",
            "share of budget": f"{share(row):.0%}",
        }
        for row in worst.values()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--out", type=Path, help="the JSON file")
    args = parser.parse_args(arguments)
    if unknown := set(args.operations) - set(CASES):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(CASES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=160)
    path = args.out or results_folder(device) / "errors.json"
    kept = json.loads(path.read_text())["rows"] if args.operations and path.exists() else []
    result = report(device, console, args.operations or list(CASES), kept)
    write_json(path, result)
    found = rows(result)
    table = Table(*found[0], title=f"Errors of kernels run {result['kernels_run']}, the tensor nearest to its budget")
    for row in found:
        table.add_row(*map(str, row.values()))
    console.print(table)
    exceeded = [row for row in result["rows"] if not row["within"]]
    for row in exceeded:
        console.print(f"exceeds its budget: {row}")
    console.print(f"{len(result['rows'])} tensors, {len(exceeded)} beyond the budget; {path}")
    return int(bool(exceeded))


if __name__ == "__main__":
    raise SystemExit(main())
