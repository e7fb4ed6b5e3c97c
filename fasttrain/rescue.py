"""What a surviving rank saves before it ends, when another has gone: alone, without a word from any other, in a few seconds.

The share that is being written is written to its end, with its receipt: if the others' are whole too, the next start commits them. Where
every rank holds everything (ZeRO 0), the lowest survivor saves the step that was reached, so that nothing is taken again.
"""

import time
from collections.abc import Callable

from fasttrain.checkpoint import PLAN, Plan, commit, folder_of, manifest_of
from fasttrain.engine.activity import Activity
from fasttrain.engine.fragments import TrainingState
from fasttrain.saving import Saver
from fasttrain.shares import share_name, write_share
from fasttrain.snapshot import Snapshot

# What the training thread may be doing while its state stands still. In an update, or while a checkpoint is loaded, it does not.
STANDS_STILL = ("data", "forward", "backward", "saving", "finishing", "reporting", "looking")


class Rescue:
    """Registered with the watchdog, which calls it from a thread of its own and waits no longer than it says.

    Args:
        plan: what a checkpoint of this moment holds; asked for while the state stands still.
    """

    def __init__(self, saver: Saver, state: TrainingState, activity: Activity, plan: Callable[[], Plan]):
        self._saver, self._state, self._activity, self._plan = saver, state, activity, plan

    def __call__(self, lowest_survivor: bool, seconds: float) -> None:
        """Saves what can be saved; returns early where there is nothing to save."""
        deadline = time.monotonic() + 0.8 * seconds
        alone = lowest_survivor and self._plan().zero_stage == 0
        self._saver.settle(0.4 * seconds if alone else 0.8 * seconds)
        if alone and (taken := self._taken(deadline)) is not None:
            self._save(*taken)

    def _taken(self, deadline: float) -> tuple[Plan, Snapshot] | None:
        """A copy of the whole state during which the training thread did not go on to anything else."""
        while time.monotonic() < deadline:
            before, snapshot = self._activity.now, Snapshot()
            if before.what in STANDS_STILL:
                plan = self._plan().model_copy(update={"world_size": 1})
                snapshot.take(self._state, whole=True)
                snapshot.ready()
                if self._activity.now.number == before.number:
                    return (plan, snapshot) if snapshot.is_finite() else None
            time.sleep(0.05)
        return None

    def _save(self, plan: Plan, snapshot: Snapshot) -> None:
        """Commits it, unless it has been; whatever stands in the way, the checkpoint before it stays."""
        final = folder_of(self._saver.folder, plan.progress.step)
        partial = final.with_suffix(".alone.tmp")
        if plan.progress.step == 0 or final.exists():
            return
        partial.mkdir(parents=True, exist_ok=True)
        plan.write(partial / PLAN)
        commit(partial, manifest_of(plan, {share_name(0): write_share(partial / share_name(0), snapshot.slices())}))
