"""What a run tells while it runs: meters on the device, and their ways out: a progress bar or plain lines, JSONL, TensorBoard."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fasttrain.engine.distributed import Processes

# Dense bf16 TFLOP/s of the datasheets: what MFU is a share of.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "RTX 4090": 165}


class Meters:
    """Sums over an interval, kept on the device: the host reads them only when `reduce` is called.

    Args:
        ranges: how many equal ranges of timesteps the unweighted loss is told apart in.
        num_timesteps: T.
    """

    def __init__(self, processes: Processes, ranges: int, num_timesteps: int):
        self._processes = processes
        # t lies in range floor(t ranges / T): each begins at the first t that is not below its share.
        edges = [-(-i * num_timesteps // ranges) for i in range(ranges + 1)]
        self._names = [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]
        self._start()

    def _start(self) -> None:
        device = self._processes.device
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._by_range = torch.zeros(len(self._names), 2, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, loss: Tensor, by_range: Tensor) -> None:
        """One micro-batch: its loss [], and for each range the sum of its samples' unweighted losses and their count [ranges, 2]."""
        self._loss += loss.detach()
        self._by_range += by_range
        self._count += 1

    def reduce(self) -> dict[str, Any]:
        """Mean loss, and unweighted loss by timestep range (None where none was drawn), over all processes; starts a new interval."""
        total = torch.stack([self._loss, torch.full_like(self._loss, self._count)])
        sums = self._processes.sum(torch.cat([total[None], self._by_range])).tolist()
        self._start()
        loss, *means = [total / count if count else None for total, count in sums]
        return {"loss": loss, "mse_by_timestep": dict(zip(self._names, means, strict=True))}


class Stopwatch:
    """Training time without the pauses for saving, sampling and evaluating."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Does not count the time of this block."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def lap(self) -> float:
        """Seconds since the last lap, pauses left out."""
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return seconds


def peak_flops(device: torch.device) -> float | None:
    """This GPU's dense bf16 FLOP/s by its datasheet; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)


class Reporter:
    """Sends what rank 0 knows to the terminal, `metrics.jsonl` and TensorBoard; silent on the other ranks.

    On a terminal it shows a progress bar; elsewhere (a Slurm log, a pipe) one plain line per report.
    """

    def __init__(self, run_dir: Path, processes: Processes, total_steps: int, tensorboard: bool):
        self._main = processes.is_main
        self._console = Console(stderr=False, quiet=not self._main, highlight=False, soft_wrap=True)
        self._total = total_steps
        self._bar: Progress | None = None
        self._jsonl = _continued(run_dir / "metrics.jsonl") if self._main else None
        self._board = _summary_writer(run_dir / "tensorboard") if self._main and tensorboard else None

    def __enter__(self) -> "Reporter":
        if self._main and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._jsonl is not None:
            self._jsonl.close()
        if self._board is not None:
            self._board.close()

    def say(self, text: str) -> None:
        """A line for people, on rank 0."""
        self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Moves the bar, where there is one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, record: dict[str, Any]) -> None:
        """A training record: to the terminal, to JSONL and to TensorBoard."""
        line = _summary(record, self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=line.partition(": ")[2])
        else:
            self.say(line)
        self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """A record to JSONL and TensorBoard only. JSON knows no NaN: a non-finite number becomes its name."""
        if self._jsonl is not None:
            self._jsonl.write(json.dumps(_jsonable(record)) + "\n")
        if self._board is not None:
            for name, value in _flat(record):
                self._board.add_scalar(name, value, record["step"])


def _continued(path: Path) -> TextIO:
    """A file of lines, to be appended to; half a line that a kill or a full disk left at its end is cut away."""
    file = path.open("a", buffering=1)
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def _summary(record: dict[str, Any], total: int) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    if record.get("grad_norm") is not None:
        parts.append(f"grad {record['grad_norm']:.3g}")
    parts.append(f"{record['images_per_second']:.0f} img/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record.get("skipped"):
        parts.append(f"{record['skipped']} steps skipped")
    parts.append(f"{_duration(record['seconds_left'])} left")
    return f"step {record['step']}/{total}: " + ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield prefix + key, float(value)


def _summary_writer(folder: Path) -> Any:
    # Imported here: it takes a second that other commands need not wait for.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
