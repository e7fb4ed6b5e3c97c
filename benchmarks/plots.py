"""What the results look like: one function a picture, from the JSON of its benchmark to SVG text."""

from typing import Any

from benchmarks.svg import bars, lines

Result = dict[str, Any]
DIRECTIONS = ("forward", "backward", "update")


def kernel_bars(result: Result) -> str:
    """Share of the copy bandwidth of the same run, by operation and direction, a bar an arm; at the first size measured of each."""
    groups = []
    for case in first_sizes(result):
        for direction in DIRECTIONS:
            values = {name: 100 * arm[direction]["of_copy"] for name, arm in case["arms"].items() if direction in arm}
            if values:
                groups.append((f"{case['case']['operation']} {direction}", values))
    title = f"Share of the copy bandwidth of the same run, {result['environment']['device']}, cold L2, minimum bytes / time"
    return bars(title, groups, " %")


def first_sizes(result: Result) -> list[Result]:
    """The first measured case of each operation: the size that the stage takes to be the most telling."""
    firsts: dict[str, Result] = {}
    for case in result["cases"]:
        if "arms" in case:
            firsts.setdefault(case["case"]["operation"], case)
    return list(firsts.values())


def step_bars(result: Result) -> str:
    """Images a second by model, a bar an arm."""
    groups = []
    for case in result["cases"]:
        if case["case"].get("part") == "arms" and "arms" in case:
            values = {name: arm["images_per_second"] for name, arm in case["arms"].items()}
            groups.append((f"{case['case']['model']}, batch {case['case']['batch']}", values))
    return bars(f"Training, images a second with optimizer and EMA, {result['environment']['device']}", groups, "")


def parity_lines(result: Result) -> str:
    """For each model: both losses, and how far the kernels and the rounding alone take them apart."""
    panels: list[Any] = []
    for case in result["cases"]:
        if "losses" in case:
            name = " ".join(map(str, case["case"].values()))
            panels.append((f"{name}: loss", {key: _numbered(values) for key, values in case["losses"].items()}, False))
            panels.append(
                (f"{name}: difference of the loss", {key: _numbered(values) for key, values in case["differences"].items()}, True)
            )
    return lines("Training with the kernels and with the references", panels)


def _numbered(values: list[float]) -> list[tuple[float, float]]:
    return [(float(step), value) for step, value in enumerate(values, start=1)]
