"""The README's tables of faults: what was done to runs, how often, and what it cost them."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.tables import read, table

Rows = tuple[list[str], list[list[str]]]
MOMENTS = {
    "data": "in data loading",
    "forward": "in a forward pass",
    "backward": "in a backward pass",
    "update": "in an update",
    "snapshot": "in a checkpoint: copying",
    "writing": "in a checkpoint: writing",
    "committing": "in a checkpoint: committing",
}
NOT_RUN = "*Not run.*"


def kills(results: Path) -> str:
    """SIGKILL by moment and ZeRO stage."""
    result = read(results / "cpu" / "faults.json")
    return "\n".join(table(*kills_rows(result))) if result and "kills" in result["trials"] else NOT_RUN


def faults(results: Path) -> str:
    """Every fault: how many trials, in how many all was as promised, and what was measured."""
    result = read(results / "cpu" / "faults.json")
    return "\n".join(table(*faults_rows(result))) if result else NOT_RUN


def kills_rows(result: dict[str, Any]) -> Rows:
    """A row a moment: kills by stage, those that lost something, steps computed again, seconds to notice and to start again."""
    trials = result["trials"].get("kills", {"outcomes": []})["outcomes"]
    every = [kill for outcome in trials for kill in outcome["figures"]["kills"]]
    stages = sorted({kill["stage"] for kill in every})
    head = ["moment of SIGKILL", *(f"ZeRO {stage}" for stage in stages), "lost", "steps redone", "noticed in s", "started again in s"]
    found = [*MOMENTS, *sorted({kill["moment"] for kill in every} - MOMENTS.keys())]
    rows = [_kills(MOMENTS.get(m, f"in {m}"), [kill for kill in every if kill["moment"] == m], stages) for m in found]
    return head, [*(row for row in rows if row), *([_kills("all", every, stages)] if every else [])]


def _kills(name: str, some: list[dict[str, Any]], stages: list[int]) -> list[str]:
    if not some:
        return []
    counts = [str(sum(kill["stage"] == stage for kill in some)) for stage in stages]
    lost = sum(kill["resumed"] is None or kill["resumed"] < kill["newest"] for kill in some)
    times = [_range([kill[key] for kill in some if kill[key] is not None]) for key in ("notice_seconds", "restart_seconds")]
    return [name, *counts, str(lost), f"{sum(kill['redone'] for kill in some) / len(some):.1f} a kill", *times]


def _range(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} (at most {max(seconds):.2f})" if seconds else ""


def faults_rows(result: dict[str, Any]) -> Rows:
    """A row a kind of fault."""
    rows = []
    for outcome in (outcome for trial in result["trials"].values() for outcome in trial["outcomes"]):
        kept = f"not run: {outcome['not_run']}" if outcome["not_run"] else f"{outcome['kept']} of {outcome['trials']}"
        rows.append(
            [outcome["name"], kept, _figures(outcome["figures"]), "; ".join(p.splitlines()[0][:80] for p in outcome["problems"][:3])]
        )
    return ["fault", "as promised", "measured", "what was not"], rows


def useful(results: Path) -> str:
    """Useful time under kills, and where the rest went."""
    result = read(results / "cpu" / "useful_time.json")
    return "\n".join(table(*useful_rows(result))) if result else NOT_RUN


def useful_rows(result: dict[str, Any]) -> Rows:
    """A row a run."""
    rows = []
    for run in result["runs"]:
        pause, enough = run["pause_a_kill"], run["enough_from_step_seconds"]
        parts = " + ".join(f"{seconds:.1f}" for seconds in pause.values())
        rows.append(
            [
                run["protocol"],
                f"{100 * run['useful']:.1f} %",
                f"{run['steps']}, {run['kills']}",
                f"{run['step_seconds']:.2f} s",
                f"{sum(pause.values()):.1f} s = {parts}",
                f"{run['steps_redone_a_kill']:.1f}",
                f"{100 * run['slower_steps_saves_and_end_seconds'] / run['wall_seconds']:.1f} %",
                "never" if enough is None else f"{enough:.1f} s",
            ]
        )
    pause = "pause a kill: " + " + ".join(result["runs"][0]["pause_a_kill"])
    rest = "saves, slower steps, the end"
    target = f"{100 * result['target']:.0f} % from a step of"
    return ["kill", "useful", "steps, kills", "a step", pause, "steps done again a kill", rest, target], rows


def _figures(figures: dict[str, Any]) -> str:
    told = []
    for name, figure in figures.items():
        words = name.replace("_", " ")
        if isinstance(figure, dict) and figure:
            told.append(f"{words}: {figure['median']:.2f}, at most {figure['max']:.2f}")
        elif isinstance(figure, int | float):
            told.append(f"{words}: {figure:g}")
    return "; ".join(told)
