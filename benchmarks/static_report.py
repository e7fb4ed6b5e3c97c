"""What is known of every kernel without running it on a GPU: registers, spills, access widths, and the bytes its loads and stores move.

    python -m benchmarks.static_report                   prints a table, writes benchmarks/results/cpu/static.json
    python -m benchmarks.static_report adaln noising     these operations anew, the others as the file has them

Static facts, and no speeds. Machine code comes from Triton's own compiler and ptxas, specialised as a launch on a GPU of 132 processors
would be, and is disassembled. Bytes are counted in Triton's interpreter, active lanes only, tensor by tensor:

- tensors in bulk (at least a quarter as many elements as the first input), per element: what the minimum is about;
- rows of modulation, weights and statistics at a stated batch: those of a launch's middle program, times its programs;
- partial sums at a stated batch: written once by one kernel, read once by the next.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.cases import CASES, Case, Shape
from rich.console import Console
from rich.table import Table

from benchmarks.environment import commit, environment, results_folder
from benchmarks.whole_file import write_json
from tests.kernels.ahead_of_time import ARCHITECTURES, Compiled, compile_launch
from tests.kernels.interpreter import Launch, run_program
from tests.kernels.passes import CPU, Passes, counted, recorded, tensors_of, worth_counting

PROCESSORS = 132
"""Of an H100 or H200."""
BATCHES = (32, 128)
"""Samples a GPU, of 256 tokens or 4 x 32 x 32 latents."""
TELLING = "sm_90"

Facts = dict[str, Any]


def machine_code(compiled: Compiled) -> Facts:
    """What one kernel is made of, for one architecture."""
    widths = Counter(f"{kind}.{8 * width}" for kind, width in compiled.global_accesses)
    return {
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_bytes": compiled.shared_bytes,
        "accesses": dict(sorted(widths.items())),
        "atomics": len(compiled.ordered_by_chance),
    }


def kernel(launch: Launch) -> Facts:
    """A launch's grid and its machine code for every architecture."""
    code = {architecture: machine_code(compile_launch(launch, architecture)) for architecture in ARCHITECTURES}
    return {"kernel": launch.kernel.fn.__name__, "grid": list(launch.grid), "warps": launch.options()["num_warps"], "machine_code": code}


def small_bytes(passes: Passes, launch: Launch, alike: Launch, alike_elements: int) -> float:
    """Bytes of all tensors that are neither in bulk nor partial sums.

    A launch through a table of addresses is not run again: `alike`, a counted one, stands for it, element by element.
    """
    through_a_table = compile_launch(launch, TELLING).pointers_from_a_table > 0
    if not through_a_table:
        run_program(launch, tuple(size // 2 for size in launch.grid), counting=True)
    source, times = (alike, passes.elements / alike_elements) if through_a_table else (launch, prod(launch.grid))
    names = tensors_of(launch).keys() - passes.bulk(launch) - passes.partial_sums(launch)
    return times * sum(traffic.read + traffic.written for name, traffic in source.traffic.items() if name in names)


def partial_bytes(passes: Passes, launches: list[Launch]) -> int:
    """Bytes of the sums that one kernel writes and the next one reads."""
    found = {}
    for launch in launches:
        tensors = tensors_of(launch)
        found.update({tensors[name].data_ptr(): tensors[name] for name in passes.partial_sums(launch)})
    return sum(2 * tensor.numel() * tensor.element_size() for tensor in found.values())


def at_batch(case: Case, options: dict[str, Any], sample: Shape, batch: int, small: Passes) -> dict[str, tuple[list[Launch], Facts]]:
    """For each direction the launches at a real batch, and the bytes that depend on it, per element."""
    passes = recorded(case, (batch, *sample), options, processors=PROCESSORS)
    found = {}
    for (direction, launches), (_, counted_launches) in zip(passes, small, strict=True):
        rows = sum(small_bytes(passes, launch, alike, small.elements) for launch, alike in zip(launches, counted_launches, strict=True))
        shares = {"rows_and_statistics": rows, "partial_sums": partial_bytes(passes, launches)}
        found[direction] = launches, {name: round(total / passes.elements, 4) for name, total in shares.items()}
    return found


def directions(operation: str, case: Case, options: dict[str, Any], sample: Shape) -> list[Facts]:
    """Everything known of the forward and of the backward pass at one size."""
    small = counted(case, worth_counting(sample), options)
    batches = {batch: at_batch(case, options, sample, batch, small) for batch in BATCHES}
    named = {name: str(value) for name, value in options.items()}
    found = []
    for (direction, launches), least in zip(small, case.minimum, strict=True):
        if launches:
            found.append(
                {
                    "operation": operation,
                    "commit": commit(),
                    "options": named,
                    "sample": list(sample),
                    "direction": direction,
                    "bytes_per_element": {"minimum": least, "in_bulk": round(small.bulk_bytes(launches) / small.elements, 4)},
                    "at_batch": {str(batch): passes[direction][1] for batch, passes in batches.items()},
                    "kernels": [kernel(launch) for launch in batches[BATCHES[0]][direction][0]],
                }
            )
    return found


def report(console: Console, operations: Sequence[str], kept: list[Facts]) -> Facts:
    """These operations with every option and size, beside what is kept of others."""
    found: dict[str, list[Facts]] = {name: [one for one in kept if one["operation"] == name] for name in CASES}
    for operation in operations:
        found[operation] = []
        for options in CASES[operation].options:
            for sample in CASES[operation].real:
                found[operation] += directions(operation, CASES[operation], options, sample)
                console.print(f"{operation} {' '.join(map(str, options.values()))} {list(sample)}")
    settings = {"processors": PROCESSORS, "batches": list(BATCHES), "dtype": "bf16", "architectures": list(ARCHITECTURES)}
    return {
        "benchmark": "static",
        "environment": environment(CPU),
        "settings": settings,
        "passes": [one for each in found.values() for one in each],
    }


def rows(result: Facts) -> list[Facts]:
    """For a table: every kernel of every pass, at width 1152 or what goes with it, on sm_90."""
    found = []
    for one in result["passes"]:
        if list(one["sample"]) == list(telling(CASES[one["operation"]])):
            for place, each in enumerate(one["kernels"]):
                found.append(_row(one, each, first=place == 0))
    return found


def telling(case: Case) -> Shape:
    return case.real[min(2, len(case.real) - 1)]


def _row(one: Facts, each: Facts, first: bool) -> Facts:
    """A kernel's row; what is known of the whole pass stands beside its first kernel."""
    code, size = each["machine_code"][TELLING], one["bytes_per_element"]
    kept = {architecture: made["spilled_bytes"] for architecture, made in each["machine_code"].items()}
    sums = [one["at_batch"][str(batch)]["partial_sums"] for batch in BATCHES]
    small = [one["at_batch"][str(batch)]["rows_and_statistics"] for batch in BATCHES]
    return {
        "operation": " ".join([one["operation"], *one["options"].values()]) if first else "",
        "pass": one["direction"] if first else "",
        "kernel": each["kernel"].strip("_").removesuffix("_kernel"),
        "warps": each["warps"],
        "registers": code["registers"],
        "spills, all targets": sum(kept.values()),
        "shared memory": code["shared_bytes"],
        "accesses (bits)": ", ".join(f"{count} {name}" for name, count in code["accesses"].items()),
        "bytes an element": f"{size['in_bulk']:g}" if first else "",
        "minimum": f"{size['minimum']:g}" if first else "",
        f"rows, statistics at {' / '.join(map(str, BATCHES))}": " / ".join(f"{value:.2f}" for value in small) if first else "",
        f"partial sums at {' / '.join(map(str, BATCHES))}": " / ".join(f"{value:.2f}" for value in sums) if first else "",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--out", type=Path, help="the JSON file")
    args = parser.parse_args(arguments)
    if unknown := set(args.operations) - set(CASES):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(CASES)}")
    torch.set_num_threads(1)
    console = Console(width=240)
    path = args.out or results_folder(CPU) / "static.json"
    kept = json.loads(path.read_text())["passes"] if args.operations and path.exists() else []
    result = report(console, args.operations or list(CASES), kept)
    write_json(path, result)
    found = rows(result)
    table = Table(*found[0], title=f"{TELLING}, bf16, width 1152 or what goes with it; all widths and targets in {path}")
    for row in found:
        table.add_row(*map(str, row.values()))
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
