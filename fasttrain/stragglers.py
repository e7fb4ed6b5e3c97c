"""How long each rank works and waits: which is the slowest, by how much, and what waiting for data costs a step."""

import socket
import statistics
import time
from typing import Any

from fasttrain.engine.distributed import Processes
from fasttrain.engine.spans import Spans

SLOW = 0.8
"""A score below this is told on the terminal."""


class Pace:
    """Times this rank's own work, from asking for a micro-batch to the end of its forward pass: before it must wait for others.

    Backward and update are left out: there ranks wait for each other. Call `mark` at the beginning of each part of a step, and `end_step`
    behind the last.

    Args:
        waits: the spans within forward passes in which this rank waits for others: where ZeRO 3 gathers weights. They are not its own.
    """

    def __init__(self, processes: Processes, waits: Spans | None = None):
        self._processes = processes
        self._own, self._waits = Spans(processes.device), waits
        self._data: list[float] = [0.0]
        self._asked = 0.0

    def mark(self, part: str) -> None:
        """Notes that this part begins: "data", "forward" and "backward" are told apart, others pass."""
        if part == "data":
            self._asked = time.perf_counter()
            self._own.begin()
        elif part == "forward":
            self._data[-1] += time.perf_counter() - self._asked
        elif part == "backward":
            self._own.end()

    def end_step(self) -> None:
        """A step has ended."""
        self._data.append(0.0)

    def report(self, seconds: float) -> dict[str, Any]:
        """What the interval's steps tell, over all ranks, each `seconds` long; starts a new interval. A collective, after a host sync.

        `data_wait`: seconds a step that the rank with the longest wait for data waited, median and 99th percentile, and their share of the
        step. `slowest`: the rank with most own time, its host, `score` (the others' median own time over its own; 1 is even, 0.5 twice
        as slow) and `share` of the step that it takes beyond that median; None for one rank.
        """
        data = self._data[:-1]
        own = self._own.take() - (self._waits.take() if self._waits else 0.0)
        shares = self._processes.gather((socket.gethostname(), own / max(len(data), 1), data))
        self._data = [0.0]
        waits = sorted(max(step) for step in zip(*(data for _, _, data in shares), strict=True))
        return {"data_wait": _waits(waits, seconds), "slowest": _slowest([(host, own) for host, own, _ in shares], seconds)}


def told(slowest: dict[str, Any] | None) -> str | None:
    """A few words for the terminal where a rank is clearly slower than the others."""
    if slowest is None or slowest["score"] >= SLOW:
        return None
    return f"rank {slowest['rank']} on {slowest['host']} slow (score {slowest['score']:.2f}, {slowest['share']:.0%} of the step)"


def _waits(waits: list[float], seconds: float) -> dict[str, float]:
    if not waits:
        return {}
    at = {name: waits[min(len(waits) - 1, int(quantile * len(waits)))] for name, quantile in (("p50", 0.5), ("p99", 0.99))}
    return {**at, "share": statistics.fmean(waits) / seconds if seconds else 0.0}


def _slowest(ranks: list[tuple[str, float]], seconds: float) -> dict[str, Any] | None:
    """Of each rank's host and own seconds a step."""
    if len(ranks) < 2:
        return None
    times = [own for _, own in ranks]
    rank = max(range(len(times)), key=times.__getitem__)
    others = statistics.median(times[:rank] + times[rank + 1 :])
    return {
        "rank": rank,
        "host": ranks[rank][0],
        "score": others / times[rank] if times[rank] else 1.0,
        "share": (times[rank] - others) / seconds if seconds else 0.0,
    }
