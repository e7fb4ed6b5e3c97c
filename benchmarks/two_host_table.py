"""The README's table of what became of a training on two hosts (`python -m benchmarks.two_hosts`)."""

from pathlib import Path
from typing import Any

from benchmarks.tables import read, table

HEAD = [
    "fault",
    "all ranks ended after",
    "allowed",
    "named",
    "left running",
    "started again after",
    "final weights, moments, averages, loss",
]


def two_hosts(results: Path) -> str:
    """From the committed result."""
    result = read(results / "cpu" / "two_hosts.json")
    return told(result) if result is not None else "*Not run.*"


def told(result: dict[str, Any]) -> str:
    """From a result: a fault a row."""
    return "\n".join(table(HEAD, [_row(name, trial) for name, trial in result["faults"].items()]))


def _row(name: str, trial: dict[str, Any]) -> list[str]:
    if "failed" in trial:
        return [name, f"**{trial['failed']}**", *[""] * 5]
    ended = ", ".join(f"{seconds:.1f} s" for _, seconds in sorted(trial["ranks_ended_seconds"].items()))
    # Both sides of a cut link name the other.
    named = " and ".join(", ".join(f"rank {rank}" for rank in verdict["ranks"]) for verdict in trial["verdicts"]) or "nobody"
    left = len(trial["left_at_restart"]) + len(trial["left_at_end"])
    same = "bit for bit the undisturbed run's" if trial["same_bits"] and trial["same_loss"] else "**differ, or not reached**"
    stacks = f"; stacks of {len(trial['stacks'])}" if trial["stacks"] else ""
    return [
        name,
        f"{ended} (ranks 0, 1)" if trial["in_time"] else f"**{ended}** (ranks 0, 1)",
        f"{trial['limit_seconds']:g} s",
        f"{named}{stacks}",
        str(left) if not left else f"**{left}**",
        f"{trial['restarted_seconds']:.1f} s",
        same,
    ]
