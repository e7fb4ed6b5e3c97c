"""What all ranks of a run decide together, once a step, without waiting for the device."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from fasttrain.engine.distributed import Processes


class Decision(NamedTuple):
    """What all ranks know of each other, the same on every one.

    Attributes:
        stop: the number of the signal that asked one of them to stop; 0: none did.
        save_failed: whether saving has failed for good on one of them.
    """

    stop: int = 0
    save_failed: bool = False


class Agreement:
    """Makes one decision a step, one step after what it decides on.

    Launchers send SIGTERM to one rank at a time, and a full disk is met by one rank, so both are reduced among all. The
    reduction runs on the CPU beside the step and is read one step later: the device is never waited for.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        self._said = torch.zeros(len(Decision._fields), dtype=torch.int32)
        self._work: dist.Work | None = None

    def reach(self, stop: int = 0, save_failed: bool = False) -> Decision:
        """The decision on what the ranks said in the step before; call once a step on every rank."""
        decision = self.close()
        self._said = torch.tensor([stop, int(save_failed)], dtype=torch.int32)
        self._work = dist.all_reduce(self._said, op=dist.ReduceOp.MAX, group=self._processes.control, async_op=True)
        return decision

    def close(self) -> Decision:
        """Waits for the reduction under way, so that no rank leaves while another still waits for it; returns what it says."""
        if self._work is None:
            return Decision()
        self._work.wait()
        self._work = None
        stop, save_failed = self._said.tolist()
        return Decision(stop, bool(save_failed))
