"""Times of repeated runs, honestly taken: cold L2, launches queued ahead of the clock, interleaved series, intervals on their ratios.

On a GPU a run is timed between two CUDA events. Before each the L2 is filled with something else, and the device is kept waiting for
some milliseconds, so that every launch of the run is queued when the clock starts: what is measured is the device's time, not the
host's. The host's time for a call is measured apart. On a CPU the clock is perf_counter and nothing is flushed.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.capture import captured

Run = Callable[[], Any]

FLUSH_FACTOR = 4
"""The flushed buffer is this many times as large as the L2: replacement is not strictly by age."""
QUEUE_CYCLES = 6_000_000
"""About three milliseconds at 2 GHz: longer than the host needs for a few hundred launches."""
LEVEL = 0.95


class Clock:
    """Times runs on one device.

    Args:
        device: where the runs happen.
        cold: write over the L2 before each run, so that it finds nothing of its inputs there.
    """

    def __init__(self, device: torch.device, cold: bool = True):
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda" and cold:
            self._flush = torch.empty(FLUSH_FACTOR * l2_bytes(device), dtype=torch.int8, device=device)

    def series(self, run: Run, repeats: int, prepare: Run | None = None) -> list[float]:
        """Seconds of each of `repeats` runs; `prepare()` goes before each, untimed, and what it returns is handed to the run."""
        if self.device.type != "cuda":
            return [self._on_the_cpu(run, prepare) for _ in range(repeats)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            given = () if prepare is None else (prepare(),)
            if self._flush is not None:
                self._flush.zero_()
            torch.cuda._sleep(QUEUE_CYCLES)
            begin.record()
            run(*given)
            end.record()
            del given
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    @staticmethod
    def _on_the_cpu(run: Run, prepare: Run | None) -> float:
        given = () if prepare is None else (prepare(),)
        begin = time.perf_counter()
        run(*given)
        return time.perf_counter() - begin


def interleaved(clock: Clock, arms: Mapping[str, tuple[Run, Run | None]], rounds: int, repeats: int) -> dict[str, list[list[float]]]:
    """Seconds by arm and round: the arms take turns (ABAB), so that whatever else happens to the device falls on all of them.

    Args:
        arms: (run, prepare) of each; all have run once before.
    """
    series: dict[str, list[list[float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (run, prepare) in arms.items():
            series[name].append(clock.series(run, repeats, prepare))
    return series


def host_seconds(run: Run, device: torch.device, repeats: int = 20) -> float:
    """Median time that the host spends on one call, with the device given time to catch up in between."""
    taken = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    synchronize(device)
    return statistics.median(taken)


def graph_series(run: Run, clock: Clock, repeats: int) -> list[float]:
    """Seconds of each replay of `run` captured as a CUDA graph, which costs one launch.

    Raises:
        ValueError: the clock's device is not a CUDA device.
    """
    if clock.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, not {clock.device}")
    graph, kept = captured(run, clock.device)
    series = clock.series(graph.replay, repeats)
    del kept
    graph.reset()
    return series


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile, and the bootstrap interval of the median."""
    p10, median, p90 = np.percentile(seconds, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "interval": median_interval(seconds), "count": len(seconds)}


def median_interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> list[float]:
    """The bootstrap interval at LEVEL of the median."""
    generator = np.random.default_rng(seed)
    drawn = generator.choice(np.asarray(values), size=(resamples, len(values)))
    return _interval(np.median(drawn, axis=1))


def ratio(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The ratio of two interleaved series' medians, with its bootstrap interval at LEVEL.

    Rounds are drawn again as pairs, since both arms met the same conditions in a round; runs within a round are drawn again apart.

    Args:
        above, below: seconds by round, as from `interleaved`; as many rounds in both, as many runs in each round.
    """
    if len(above) != len(below):
        raise ValueError(f"the series must have as many rounds, got {len(above)} and {len(below)}")
    generator = np.random.default_rng(seed)
    rounds = generator.integers(len(above), size=(resamples, len(above)))
    top, bottom = (_drawn_again(np.asarray(series), rounds, generator) for series in (above, below))
    return {"median": float(np.median(above) / np.median(below)), "interval": _interval(top / bottom), "level": LEVEL}


def _drawn_again(series: np.ndarray, rounds: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians of series [rounds, runs] after drawing these rounds [resamples, rounds], and in each as many runs as it has."""
    runs = generator.integers(series.shape[1], size=(*rounds.shape, series.shape[1]))
    return np.median(series[rounds[..., None], runs], axis=(1, 2))


def flat(rounds: Sequence[Sequence[float]]) -> list[float]:
    """All rounds' values as one list."""
    return [value for series in rounds for value in series]


def synchronize(device: torch.device) -> None:
    """Waits for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def l2_bytes(device: torch.device) -> int:
    """Bytes of the GPU's L2; 64 MiB, more than any has that we know, where torch does not tell."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None) or 64 * 2**20


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return [float(low), float(high)]
