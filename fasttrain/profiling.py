"""`--profile N`: a torch profiler trace of a few steps, to be opened in Perfetto or chrome://tracing."""

from pathlib import Path
from types import TracebackType

import torch

from fasttrain.engine.distributed import Processes

SKIPPED_STEPS = 3  # the first steps allocate and compile: they say nothing about the others


class Profiler:
    """Traces `steps` training steps on rank 0 after the first few; does nothing when `steps` is 0."""

    def __init__(self, run_dir: Path, processes: Processes, steps: int):
        self._path = run_dir / "profile.json.gz"
        self._profile: torch.profiler.profile | None = None
        if steps and processes.is_main:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if processes.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            plan = torch.profiler.schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=steps, repeat=1)
            self._profile = torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=self._write, record_shapes=True)

    def step(self) -> None:
        """Marks the end of a training step."""
        if self._profile is not None:
            self._profile.step()

    def __enter__(self) -> "Profiler":
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, value, trace)

    def _write(self, profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(self._path))
        print(f"profile written to {self._path}", flush=True)
