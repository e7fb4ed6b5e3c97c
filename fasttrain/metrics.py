"""What a run tells while it runs: meters on the device, and their ways out: a progress bar or plain lines, JSONL, TensorBoard."""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fasttrain.engine.distributed import Processes
from fasttrain.lines import Lines
from fasttrain.stragglers import told

# Dense bf16 TFLOP/s of the datasheets: what MFU is a share of.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "RTX 4090": 165}


class Meters:
    """The losses of an interval, kept on the device: the host reads them only when `reduce` is called.

    Args:
        ranges: how many equal ranges of timesteps the unweighted loss is told apart in.
        num_timesteps: T.
        accumulation_steps: micro-batches of a step.
    """

    def __init__(self, processes: Processes, ranges: int, num_timesteps: int, accumulation_steps: int = 1):
        self._processes = processes
        # t lies in range floor(t ranges / T): each begins at the first t that is not below its share.
        edges = [-(-i * num_timesteps // ranges) for i in range(ranges + 1)]
        self.names = [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]
        self._accumulation_steps = accumulation_steps
        self._losses: list[Tensor] = []
        self._by_range: list[Tensor] = []

    def add(self, loss: Tensor, by_range: Tensor) -> None:
        """One micro-batch: its weighted loss [], and for each range the sum of its samples' unweighted losses and their count [ranges, 2].

        The weighted loss is that without a learned uncertainty, as the held-out loss is: with it a loss can be negative.
        """
        self._losses.append(loss.detach())
        self._by_range.append(by_range)

    def last_step(self) -> tuple[list[float], list[list[float]]]:
        """This process's losses of the last step's micro-batches, and its sums and counts by range. A host sync."""
        last = slice(-self._accumulation_steps, None)
        return torch.stack(self._losses[last]).tolist(), torch.stack(self._by_range[last]).double().sum(0).tolist()

    def reduce(self) -> dict[str, Any]:
        """What the interval's steps lost, over all processes; starts a new interval.

        `losses` has each step's; `loss` is their mean, and `mse_by_timestep` the mean unweighted loss by timestep range (None where none
        was drawn): both without what was not finite, which `skipped` counts.
        """
        if not self._losses:
            return {"loss": None, "losses": [], "mse_by_timestep": dict.fromkeys(self.names)}
        losses, by_range = torch.stack(self._losses).double(), torch.stack(self._by_range).double()
        rows = torch.cat([losses[:, None], by_range.flatten(1)], dim=1).view(-1, self._accumulation_steps, 1 + by_range[0].numel()).sum(1)
        self._losses, self._by_range = [], []
        table = self._processes.sum(rows).tolist()
        batches = self._accumulation_steps * self._processes.world_size
        per_step = [row[0] / batches for row in table]
        fine = [loss for loss in per_step if math.isfinite(loss)]
        return {"loss": math.fsum(fine) / len(fine) if fine else math.nan, "losses": per_step, "mse_by_timestep": self.means(table)}

    def means(self, rows: list[list[float]]) -> dict[str, float | None]:
        """Mean by range from rows of [loss, sum, count, sum, count ...], the sums that are not finite left out."""
        means: dict[str, float | None] = {}
        for i, name in enumerate(self.names):
            drawn = [(row[1 + 2 * i], row[2 + 2 * i]) for row in rows if math.isfinite(row[1 + 2 * i])]
            count = sum(count for _, count in drawn)
            means[name] = math.fsum(total for total, _ in drawn) / count if count else None
        return means


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
        self._jsonl = Lines(run_dir / "metrics.jsonl") if self._main else None
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
            with suppress(OSError):  # a disk that is full at the end takes no more of it
                self._board.close()

    def say(self, text: str) -> None:
        """A line for people, on rank 0. What a full disk does not take of a log waits in memory for the next line."""
        with suppress(OSError):
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
        """A record to JSONL and TensorBoard only. A disk that takes no more is told once, and training goes on."""
        if self._jsonl is not None:
            before = self._jsonl.problem
            self._jsonl.write(record)
            if self._jsonl.problem and not before:
                self.say(f"metrics.jsonl cannot be written: {self._jsonl.problem}; training goes on, and its records wait in memory")
        if self._board is not None:
            try:
                for name, value in _flat(record):
                    self._board.add_scalar(name, value, record["step"])
            except OSError as error:
                self._board = None
                self.say(f"TensorBoard's file cannot be written: {error}; training goes on without it")

    def forget_after(self, step: int) -> None:
        """Takes back the records of steps that a resumed run takes again."""
        if self._jsonl is not None:
            self._jsonl.forget_after(step)


def _summary(record: dict[str, Any], total: int) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    if record.get("grad_norm") is not None:
        parts.append(f"grad {record['grad_norm']:.3g}")
    parts.append(f"{record['images_per_second']:.0f} img/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record.get("skipped"):
        parts.append(f"{record['skipped']} steps skipped")
    if slow := told(record.get("slowest")):
        parts.append(slow)
    parts.append(f"{_duration(record['seconds_left'])} left")
    return f"step {record['step']}/{total}: " + ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
