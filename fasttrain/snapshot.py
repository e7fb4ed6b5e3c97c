"""A copy of this rank's share of the training state: taken between two steps, written while the next ones go on."""

import time
from collections.abc import Iterator

import torch

from fasttrain.engine.fragments import Fragment, TrainingState


class Snapshot:
    """Buffers on the CPU that are kept from one save to the next.

    On a GPU they are pinned, and the copies wait in the current stream before the next step's kernels: the host goes on at once.

    Attributes:
        stall_seconds: what the last `take` cost: the host's time, or the GPU's where that was more (known after `ready`).
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._marks: list[torch.cuda.Event] = []
        self.stall_seconds = 0.0

    def take(self, state: TrainingState, whole: bool = False) -> None:
        """Copies what this rank writes to a checkpoint; `whole`: all that it holds."""
        begin = time.perf_counter()
        views = dict(_named(state.fragments if whole else state.owned()))
        on_gpu = any(view.is_cuda for view in views.values())
        self._marks = [_mark()] if on_gpu else []
        for name, view in views.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
            self._buffers[name].copy_(view, non_blocking=True)
        if on_gpu:
            self._marks.append(_mark())
        self.stall_seconds = time.perf_counter() - begin

    def ready(self) -> None:
        """Waits until the copies are whole; called by the thread that writes them."""
        if self._marks:
            begin, end = self._marks
            end.synchronize()
            self.stall_seconds = max(self.stall_seconds, begin.elapsed_time(end) / 1000)
            self._marks = []

    def is_finite(self) -> bool:
        """Whether every element is finite."""
        return all(bool(torch.isfinite(torch.stack(torch.aminmax(t))).all()) for t in self._buffers.values() if t.numel())

    def slices(self) -> dict[str, torch.Tensor]:
        """The copies by their names in a share."""
        return self._buffers


def _named(fragments: list[Fragment]) -> Iterator[tuple[str, torch.Tensor]]:
    for fragment in fragments:
        for key, view in fragment.state.items():
            yield f"{fragment.name}|{key}|{fragment.start}", view


def _mark() -> torch.cuda.Event:
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark
