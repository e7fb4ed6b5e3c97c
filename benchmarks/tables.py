"""The README's tables: one function a table, from committed results to Markdown."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.plots import first_sizes

Result = dict[str, Any]
NOT_MEASURED = "*Not measured: no result of a GPU is committed, and nothing is claimed.*"


def kernels(results: Path) -> str:
    """Every GPU's kernels: bandwidth of ours, its share of a copy, and how much longer the compiled reference takes."""
    return _by_gpu(results, "kernels.json", _kernels)


def _kernels(device: str, result: Result) -> list[str]:
    rows = []
    for case in first_sizes(result):
        name, arms = case["case"], case["arms"]
        for direction in ("forward", "backward", "update"):
            found = arms.get("ours", {}).get(direction)
            if found is None:
                if any(direction in arm for arm in arms.values()):
                    rows.append(
                        [name["operation"], direction, _size(name), *[""] * 3, f"refused: {case['refused'].get('ours', 'no speed')}"]
                    )
                continue
            rate = f"{found['bytes_per_second'] / 1e12:.2f} TB/s"
            compiled, copied, paper = (
                _ratio(case, f"{direction}_compile_over_ours"),
                _percent(found["of_copy"]),
                _percent(found["of_datasheet"]),
            )
            rows.append([name["operation"], direction, _size(name), rate, copied, paper, compiled])
    head = ["operation", "", "sample, batch", "minimum bytes / time", "of a copy", "of the datasheet", "compiled reference / ours"]
    copy = result["copy"]["bytes_per_second"] / 1e12
    about = f"{_on(device, result)}; a copy moved {copy:.2f} TB/s in the same run. Cold L2, bf16; the ratio with its 95 % interval."
    return [about, "", *table(head, rows)]


def step(results: Path) -> str:
    """Every GPU's training steps, an arm a row."""
    return _by_gpu(results, "step.json", _step)


def _step(device: str, result: Result) -> list[str]:
    rows = []
    for case in (case for case in result["cases"] if case["case"].get("part") == "arms" and "arms" in case):
        name = f"{case['case']['model']}, batch {case['case']['batch']}"
        for arm, found in case["arms"].items():
            seconds = found["step"]["seconds"]
            times = f"{1e3 * seconds['median']:.1f} ({1e3 * seconds['p10']:.1f} to {1e3 * seconds['p90']:.1f})"
            over = case.get("over_ours", {}).get(arm)
            share = f"{_percent(found['mfu_measured'])}, {_percent(found['mfu_datasheet'])}"
            memory = f"{found['peak_bytes'] / 2**30:.1f}"
            rows.append([name, arm, f"{found['images_per_second']:.0f}", times, share, memory, _with_interval(over) if over else "1"])
        rows += [[name, arm, "", "", "", "", f"no speed: {reason.splitlines()[0][:80]}"] for arm, reason in case["refused"].items()]
    head = ["model", "arm", "images/s", "ms a step, p10 to p90", "MFU, of measured and of datasheet", "peak GiB", "time / our best"]
    return [f"{_on(device, result)}. Optimizer and EMA included; masters, moments and average of all arms are one.", "", *table(head, rows)]


def parity(results: Path) -> str:
    """Training with the kernels beside training with the references, wherever it was run."""
    rows = []
    for folder in _devices(results, every=True):
        if (result := read(folder / "parity.json")) is None:
            continue
        for case in (case for case in result["cases"] if "agree" in case):
            share, apart = case["largest_share_of_budget"], case["final_weights_apart"]["kernels"]
            verdict = "agree" if case["agree"] else "**do not agree**"
            how = f"{result['settings']['steps']} steps, {result['settings']['kernels_run']}"
            rows.append([case["case"]["model"], how, verdict, f"{share:.2f}", f"{apart:.1e}"])
    head = ["model", "run", "losses and weights", "furthest loss, as a share of the budget", "final weights apart, relative"]
    return "\n".join(table(head, rows)) if rows else "*Not run.*"


def loader(results: Path) -> str:
    """The loader beside webdataset's own pipeline."""
    result = read(results / "cpu" / "loader.json")
    if result is None:
        return "*Not run.*"
    size = result["settings"]["sample_bytes"] / 1e9
    rows = []
    for name, rate in result["samples_per_second"].items():
        own = result["samples_per_cpu_second"][name]["median"]
        rows.append([name, *(f"{rate[key]:,.0f}" for key in ("median", "min", "max")), f"{own:,.0f}", f"{own * size:.2f}"])
    ratio = result["ratio"]
    rows.append(["ratio", *(f"{ratio[key]:.0f}" for key in ("median", "min", "max")), f"{result['cpu_ratio']['median']:.0f}", ""])
    head = ["samples a second on one core", "median", "least", "most", "a second of its own CPU time", "GB in that"]
    return "\n".join(table(head, rows))


WAIT_COLUMNS = {"median_ms": "median wait, ms", "p99_ms": "p99, ms", "max_ms": "most, ms"}


def waits(results: Path) -> str:
    """What a node of eight readers waits for a step, by where its shards are."""
    result = read(results / "cpu" / "loader.json")
    if result is None:
        return "*Not run.*"
    waited = result["node"]["waits"].items()
    rows = [[name, *(f"{each[key]:.1f}" for key in WAIT_COLUMNS), f"{each['stall_share']:.1%}"] for name, each in waited]
    return "\n".join(table(["shards", *WAIT_COLUMNS.values(), "share of the time"], rows))


CHECKPOINT_ROWS = {
    "save that is waited for, until durable, s": "waited_for_seconds",
    "stall of a save beside training, s": "stall_seconds",
    "times less": "ratio",
    "step without a save, s": "quiet_step_seconds",
    "step beside a save, s": "beside_step_seconds",
    "save beside training, until durable, s": "beside_until_durable_seconds",
}


def checkpoint(results: Path) -> str:
    """What a checkpoint costs training."""
    result = read(results / "cpu" / "checkpoint.json")
    return "\n".join(table(*checkpoint_rows(result))) if result else "*Not run.*"


def checkpoint_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """A row a figure, a column a world size: median, and range over the rounds."""
    measured = result["results"]
    size = measured[0]["bytes"] / 1e9
    head = [f"{size:.2f} GB", *(f"{m['ranks']} rank{'s' if m['ranks'] > 1 else ''}" for m in measured)]
    cells = {words: [m[name] for m in measured] for words, name in CHECKPOINT_ROWS.items()}
    return head, [[words, *(f"{c['median']:.3g} ({c['min']:.3g} to {c['max']:.3g})" for c in row)] for words, row in cells.items()]


def tests(results: Path) -> str:
    """What became of the kernels' tests on every GPU."""
    return _by_gpu(results, "tests.json", _tests)


def _tests(device: str, result: Result) -> list[str]:
    rows = []
    for part, found in result["parts"].items():
        counts = [str(found["outcomes"].get(outcome, 0)) for outcome in ("passed", "failed", "error", "skipped")]
        rows.append([part, *counts, str(found["not_run"])])
    return [f"{device}:", "", *table(["part", "passed", "failed", "errors", "skipped", "not run"], rows)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def show(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table on the screen: names to the left, figures to the right."""
    shown = Table(title=title)
    for number, column in enumerate(head):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def _by_gpu(results: Path, name: str, told: Callable[[str, Result], list[str]]) -> str:
    parts = []
    for folder in _devices(results):
        if (result := read(folder / name)) is not None:
            picture = (folder / name).with_suffix(".svg")
            parts.append("\n".join(told(folder.name, result)))
            if picture.exists():
                parts.append(f"![{name.removesuffix('.json')} on {folder.name}]({picture.relative_to(results.parent.parent).as_posix()})")
    return "\n\n".join(parts) if parts else NOT_MEASURED


def _devices(results: Path, every: bool = False) -> list[Path]:
    return sorted(folder for folder in results.iterdir() if folder.is_dir() and (every or folder.name != "cpu"))


def read(path: Path) -> Result | None:
    """A result, or None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def _on(device: str, result: Result) -> str:
    about = result["environment"]
    digest = ", the ten-minute digest" if result["settings"].get("digest") else ""
    return f"{about.get('gpu', device)}, torch {about['torch']}, Triton {about.get('triton')}{digest}"


def _size(name: dict[str, Any]) -> str:
    return f"{' x '.join(map(str, name['sample']))}, {name['batch']}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _ratio(case: Result, key: str) -> str:
    return _with_interval(case[key]) if key in case else ""


def _with_interval(ratio: dict[str, Any]) -> str:
    low, high = ratio["interval"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"
