"""Saving beside training: a step pays for the copy of its state, a thread does the rest, and a failure is tried again.

One attempt, the same on all ranks, over a process group of its own (three small exchanges):

    ready       rank 0 makes `step-N.tmp` and writes into it what it will hold; every rank has looked whether its copy is finite
    written     every rank has written its share, then the receipt, both durably
    committed   rank 0 has written the manifest, renamed the folder and moved the pointer; then it deletes what is no longer kept

What fails in any of them (a full disk, a folder that is not writable) is known to all ranks at its end. The partial folder is removed,
and after a pause of 1, 2, 4 ... 30 s the same copy is tried again, or the next one that training has reached by then. Every such decision
is made in an exchange, never by one rank. After `retry_seconds` without success saving has failed, and the run ends.
"""

import math
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fasttrain.checkpoint import PLAN, Plan, Receipt, commit, committed, folder_of, manifest_of, step_of
from fasttrain.config import CheckpointConfig
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import TrainingState
from fasttrain.errors import DivergedError, UserError
from fasttrain.shares import Written, share_name, write_share
from fasttrain.snapshot import Snapshot

LONGEST_PAUSE = 30.0
REMEDY = "make room or mend the disk"


class Ready(NamedTuple):
    """What a rank says before anything is written: whether its copy is finite, a newer one waits, and what stands in its way."""

    finite: bool
    superseded: bool
    problem: str | None


@dataclass
class Trouble:
    """A failure that has not ended yet.

    Attributes:
        since: time.monotonic() of the first one.
        attempts: how many have failed.
        next: time.monotonic() before which nothing is tried.
    """

    since: float
    attempts: int = 0
    next: float = 0.0

    def pause(self, hurried: bool) -> None:
        """Waits longer each time, but not where the run waits for this save."""
        self.next = time.monotonic() + (1.0 if hurried else min(LONGEST_PAUSE, 2.0**self.attempts))
        self.attempts += 1


class Saver:
    """Saves a run's checkpoints. `begin`, `finish` and `close` are called by all ranks at the same step.

    Attributes:
        folder: of all checkpoints.
        saved: the newest one committed since the start.
    """

    def __init__(self, run_dir: Path, processes: Processes, config: CheckpointConfig, timeout_seconds: float):
        self.folder = run_dir / "checkpoints"
        self.saved: Path | None = None
        self._config = config
        self._processes = processes.apart(timeout_seconds)
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._written = threading.Event()
        self._superseded = False
        self._give_up_at = math.inf
        self._trouble: Trouble | None = None
        self._failure: Exception | None = None
        self._told: deque[str] = deque()
        self._distrusted: set[Path] = set()
        self._waited = 0.0

    @property
    def failed(self) -> str | None:
        """Why saving has failed for good: the same words on every rank."""
        return None if self._failure is None else str(self._failure)

    @property
    def stall_seconds(self) -> float:
        """What the last `begin` cost training: the wait for the save before it, and the copy."""
        return self._waited + self._snapshot.stall_seconds

    def raise_failure(self) -> None:
        """Raises what the run ends with, where saving has failed for good: a UserError, unless a rank has gone."""
        if self._failure is not None:
            raise self._failure

    def continue_from(self, found: Path) -> None:
        """Tells which checkpoint the run goes on from: newer ones were passed over, and must not push out what can be trusted."""
        self._distrusted = {folder for folder in committed(self.folder) if step_of(folder) > step_of(found)}

    def begin(self, state: TrainingState, plan: Plan) -> None:
        """Copies the state of this step and saves it beside training. Waits for the attempt under way, if there is one.

        Raises:
            UserError: saving has failed for good.
        """
        began = time.perf_counter()
        self._superseded = True
        self._join()
        self._superseded = False
        self._waited = time.perf_counter() - began
        self.raise_failure()
        self._snapshot.take(state)
        self._written.clear()
        self._hurry.clear()
        self._thread = threading.Thread(target=self._save, args=(plan,), name="fasttrain-saver", daemon=True)
        self._thread.start()

    def poll(self) -> list[str]:
        """What there is to tell since the last call; rank 0 tells it. No collective."""
        return [self._told.popleft() for _ in range(len(self._told))]

    def finish(self, seconds: float | None = None) -> None:
        """Waits until what was begun is committed.

        Args:
            seconds: how long to go on trying again; None: as long as ever.

        Raises:
            UserError: it failed for good; those before it are intact.
        """
        if seconds is not None:
            self._give_up_at = time.monotonic() + seconds
        self._join()
        self._give_up_at = math.inf
        self.raise_failure()

    def settle(self, seconds: float) -> None:
        """Waits so long for this rank's share to be written, where others may be gone and no more than that can come of it."""
        deadline = time.monotonic() + seconds
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            if self._written.wait(0.05):
                return

    def close(self, seconds: float = 20.0) -> None:
        """Lets the attempt under way end, where a run ends that does not wait for it; gives up after so many seconds."""
        if self._thread is not None:
            self._superseded = True
            self._hurry.set()
            self._thread.join(seconds)

    def _join(self) -> None:
        if self._thread is not None:
            self._hurry.set()
            self._thread.join()
            self._thread = None

    def _save(self, plan: Plan) -> None:
        try:
            while not self._attempt(plan):
                pass
        except Exception as error:  # a rank has gone, or this is a mistake of ours: for the training thread to end with
            self._failure = RuntimeError(f"saving step {plan.progress.step} broke off: {error}")
            self._failure.__cause__ = error

    def _attempt(self, plan: Plan) -> bool:
        """Whether it is over: saved, given up, or left to a newer one."""
        self._rest()
        partial = folder_of(self.folder, plan.progress.step).with_suffix(".tmp")
        told = self._processes.gather(self._ready(partial, plan))
        if any(ready.superseded for ready in told):
            return self._leave(partial)
        if not all(ready.finite for ready in told):
            return self._refuse(partial, plan.progress.step)
        problems = [ready.problem for ready in told if ready.problem] or self._write(partial, plan)
        if problems:
            return self._fail(partial, plan.progress.step, problems)
        self.saved = partial.with_suffix("")
        if self._trouble is not None:
            seconds = time.monotonic() - self._trouble.since
            self._tell(f"{self.saved.name} is saved: what had kept checkpoints from it for {seconds:.0f} s is over")
            self._trouble = None
        return True

    def _rest(self) -> None:
        """Waits out the pause after a failure, unless the training thread waits for this thread."""
        if self._trouble is not None and self._hurry.wait(max(0.0, self._trouble.next - time.monotonic())):
            # Woken once; where the run waits for this save, the pauses after that are short.
            self._hurry.clear()

    def _ready(self, partial: Path, plan: Plan) -> Ready:
        self._snapshot.ready()
        superseded = self._superseded and self._trouble is not None
        finite = superseded or self._snapshot.is_finite()
        problem = self._prepare(partial, plan) if self._processes.is_main and finite and not superseded else None
        return Ready(finite, superseded, problem)

    def _prepare(self, partial: Path, plan: Plan) -> str | None:
        """Makes the folder to write into, and takes away what killed saves have left."""
        for unfinished in [*self.folder.glob("step-*.tmp"), *self.folder.glob("step-*.replaced")]:
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            for draft in self.folder.glob("latest.*.tmp"):
                draft.unlink(missing_ok=True)
            partial.mkdir(parents=True, exist_ok=True)
            plan.write(partial / PLAN)
        except OSError as error:
            return f"rank 0 could not make {partial}: {error.strerror}"
        return None

    def _write(self, partial: Path, plan: Plan) -> list[str]:
        """The shares, then the commit; returns what stood in the way."""
        told = self._processes.gather(self._write_share(partial))
        if problems := [share for share in told if isinstance(share, str)]:
            return problems
        problem = None
        if self._processes.is_main:
            problem = commit(partial, manifest_of(plan, {share_name(rank): share for rank, share in enumerate(told)}))
        problem = self._processes.from_main(problem)
        if problem is None and self._processes.is_main:
            self._forget_before(partial.with_suffix(""))
        return [problem] if problem else []

    def _write_share(self, partial: Path) -> Written | str:
        path = partial / share_name(self._processes.rank)
        try:
            share = write_share(path, self._snapshot.slices())
            Receipt(share=share).write(path.with_suffix(".json"))
            return share
        except (OSError, MemoryError, RuntimeError) as error:
            return f"rank {self._processes.rank} could not write {path}: {getattr(error, 'strerror', None) or error}"
        finally:
            self._written.set()

    def _leave(self, partial: Path) -> bool:
        self._remove(partial)
        return True

    def _refuse(self, partial: Path, step: int) -> bool:
        self._remove(partial)
        self._failure = DivergedError(
            f"the training state at step {step} holds a non-finite value and is not saved; the checkpoint before it stays"
        )
        return True

    def _fail(self, partial: Path, step: int, problems: list[str]) -> bool:
        """Whether to give up, by rank 0's clock; tells of the first failure, and makes ready to try again."""
        self._remove(partial)
        now = time.monotonic()
        trouble = self._trouble or Trouble(since=now)
        last = min(trouble.since + self._config.retry_seconds, self._give_up_at)
        told = "; ".join(problems) + f"; {REMEDY}"
        if self._processes.from_main(now >= last):
            self._failure = UserError(f"no checkpoint of step {step} was saved; those before it are intact ({self._newest()}): {told}")
            return True
        if self._trouble is None:
            self._tell(f"step {step} is not saved yet: {told}. Training goes on; trying again for {last - now:.0f} s")
        trouble.pause(hurried=math.isfinite(self._give_up_at))
        self._trouble = trouble
        return False

    def _newest(self) -> str:
        newest = self._processes.from_main(next((f.name for f in committed(self.folder)), None) if self._processes.is_main else None)
        return f"the newest is {newest}" if newest else "there is none yet"

    def _remove(self, partial: Path) -> None:
        if self._processes.is_main:
            shutil.rmtree(partial, ignore_errors=True)

    def _tell(self, text: str) -> None:
        if self._processes.is_main:
            self._told.append(text)

    def _forget_before(self, newest: Path) -> None:
        """Deletes what is older than the newest and not kept. Later ones were passed over: they stay until this run is past them."""
        self._distrusted.discard(newest)
        older = [folder for folder in committed(self.folder) if step_of(folder) < step_of(newest)]
        trusted = [folder for folder in older if folder not in self._distrusted]
        every = self._config.keep_every
        kept = {*trusted[: self._config.keep_last - 1], *(f for f in trusted if every and step_of(f) % every == 0)}
        for folder in [*(f for f in older if f not in kept), *self.folder.glob("step-*.replaced")]:
            shutil.rmtree(folder, ignore_errors=True)
