"""A stage of measurements: cases one after another within a time limit, each one's outcome in a JSON file as soon as it is known.

A case that fails leaves its error in the file and the next one runs; what no longer fits into the limit is listed as not run. So a
stage that is cut off, by its own limit or from outside, has lost at most the case under way, and a long one keeps what it has so far.
"""

import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.whole_file import write_json

NO_DEVICE = "no CUDA device"
NO_TIME = "the stage's time was up"

Figures = dict[str, Any]


class Stage:
    """Runs named cases and keeps their results in `path`.

    Args:
        path: the JSON file, written anew after every case.
        benchmark: what is measured; the result's name in the README's tables.
        environment: of `environment.environment`.
        settings: whatever else the figures depend on.
        seconds: the limit; no case starts that would not end within it if it took as long as the longest one so far of its part.
    """

    def __init__(self, path: Path, benchmark: str, environment: Figures, settings: Figures, seconds: float):
        self.path = path
        self.seconds = seconds
        self.result: Figures = {
            "benchmark": benchmark,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment,
            "settings": settings,
            "cases": [],
        }
        self._start = time.monotonic()
        self._longest: dict[Any, float] = {}
        self._under_way: Figures = {}
        self._lost: str | None = None
        self.write()

    def case(self, measure: Callable[[], Figures], *, least: float | None = None, **keys: Any) -> Figures:
        """Measures one case, named by `keys`; returns what is written of it: its figures, its error, or why it was not run.

        Args:
            least: seconds that must be left for it to begin, if it ends itself in time; else as many as the longest of its `part` took.
        """
        begin, part, self._under_way = time.monotonic(), keys.get("part"), keys
        longest = self._longest.get(part, 0.0)
        outcome = {"case": keys, **self._outcome(measure, longest if least is None else least)}
        self._longest[part] = max(longest, time.monotonic() - begin)
        self.result["cases"].append(outcome)
        self.write()
        print(summary(outcome), flush=True)
        return outcome

    def note(self, **figures: Any) -> None:
        """Adds figures that belong to the whole stage, such as the copy bandwidth."""
        self.result.update(figures)
        self.write()

    def so_far(self, figures: Figures) -> None:
        """Writes what is known of the case under way, for the event that the stage is stopped within it."""
        unfinished = {"case": self._under_way, **figures, "unfinished": True}
        write_json(self.path, {**self.result, "cases": [*self.result["cases"], unfinished]})

    def remaining(self) -> float:
        """Seconds to the limit."""
        return self.seconds - (time.monotonic() - self._start)

    def write(self) -> None:
        """The whole result, replacing the file at once: a reader never sees half of it."""
        self.result["seconds"] = round(time.monotonic() - self._start, 3)
        write_json(self.path, self.result)

    def failed(self) -> list[Figures]:
        """The cases that ended in an error, or that refused an arm of ours for more than want of time: our own fault is no pass."""
        return [case for case in self.result["cases"] if "error" in case or _refused_ours(case)]

    def _outcome(self, measure: Callable[[], Figures], least: float) -> Figures:
        if self._lost:
            return {"not_run": self._lost}
        if self.remaining() < least:
            return {"not_run": NO_TIME}
        try:
            return measure()
        except Exception as error:
            self._lost = lost_device(error)
            if torch.cuda.is_available() and not self._lost:
                torch.cuda.empty_cache()
            return {"error": described(error), "traceback": traceback.format_exc()[-4000:]}


def described(error: BaseException) -> str:
    """The error in a line, and the one that it came from: a CUDA graph's capture that failed only tells that something had failed."""
    cause = error.__cause__ or error.__context__
    told = f"{type(error).__name__}: {error}"[:1000]
    return f"{told}, from {type(cause).__name__}: {cause}"[:2000] if cause else told


def lost_device(error: Exception) -> str | None:
    """Why nothing more can run in this process: after a fault of the device, every later CUDA call fails as well."""
    faults = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure", "illegal instruction")
    fault = next((fault for fault in faults if fault in described(error)), None)
    return f"the device was lost to an earlier error ({fault})" if fault else None


def summary(case: Figures) -> str:
    """One line about a case: its name, and how it ended."""
    name = " ".join(map(str, case["case"].values()))
    told = next((f"{word.replace('_', ' ')}: {case[word]}" for word in ("error", "not_run") if word in case), case.get("told", "measured"))
    return f"{name}: {told}"


def _refused_ours(case: Figures) -> bool:
    return any(name.startswith("ours") and reason != NO_TIME for name, reason in case.get("refused", {}).items())
