"""Sums of spans of time on a device, without waiting for it."""

import time

import torch


class Spans:
    """How long something took, all together: by the clock on a CPU; on a GPU between CUDA events, which are read in `take` only."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds = self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """A span begins where the device's stream is now."""
        self._began = time.perf_counter()
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def end(self) -> None:
        """It ends."""
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds of all spans since the last time. On a GPU call it behind a sync with the stream."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds
