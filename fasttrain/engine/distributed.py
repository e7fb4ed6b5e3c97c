"""The processes of a run: who this one is, and how they agree."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from fasttrain.engine.host import machine
from fasttrain.engine.launch import place
from fasttrain.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among all of a run, as the launcher numbered them.

    `control` is a gloo group beside the one that carries gradients: decisions and small objects travel on it, from the CPU.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, item: Any) -> list[Any]:
        """Every process's item, in rank order, on every process."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def gather_to_main(self, item: Any) -> list[Any]:
        """Every process's item, in rank order, on rank 0; an empty list elsewhere."""
        items: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(item, items, dst=0, group=self.control)
        return items or []

    def from_main(self, item: Any) -> Any:
        """Rank 0's item on every process; a process alone keeps its own, uncopied: it may be large."""
        if self.world_size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def all(self, fine: bool) -> bool:
        """Whether it is fine on every process."""
        return all(self.gather(fine))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the processes, in place."""
        dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def apart(self, timeout_seconds: float) -> "Processes":
        """The same processes with a control group of their own, so that another thread may talk beside this one. A collective."""
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
        return replace(self, control=group)


@contextmanager
def joined(timeout_seconds: float) -> Iterator[Processes]:
    """The processes of a run, for as long as the block lasts.

    A mistake that ends it carries `told_elsewhere`: whether another rank has met the same one and tells it. One that only this rank
    meets, such as a damaged shard, would be lost if only rank 0 spoke.
    """
    try:
        yield start(timeout_seconds)
    except (UserError, OSError) as error:
        error.told_elsewhere = not _first_to_meet(str(error))  # type: ignore[union-attr]
        raise
    finally:
        finish()


def _first_to_meet(told: str) -> bool:
    if not dist.is_initialized():
        return True  # joining failed: what it met is this rank's own
    try:
        return dist.distributed_c10d._get_default_store().add(f"fasttrain/told/{told}", 1) == 1
    except RuntimeError:
        return True  # rank 0, which keeps the store, has gone


def start(timeout_seconds: float) -> Processes:
    """Joins the process group named by the launcher's environment, or makes a group of one.

    Args:
        timeout_seconds: how long a collective may wait before the process gives up.
    """
    mine = place(os.environ)
    _limit_every_group(timeout_seconds)
    os.environ.update(mine.variables())
    # A process alone has nobody to meet, also when an earlier start in this process has set the ranks.
    group: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if mine.address is None else {}
    device = _device(mine.local_rank)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **group)
    control = dist.new_group(backend="gloo", timeout=timeout)
    processes = Processes(mine.rank, mine.world_size, mine.local_rank, device, control)
    # As torchrun sets it, whoever started the process: how many share what a machine has, such as its cache of shards.
    os.environ["LOCAL_WORLD_SIZE"] = str(processes.gather(machine()).count(machine()))
    return processes


def finish() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start fewer processes on it")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _limit_every_group(timeout_seconds: float) -> None:
    """Gives the groups that DeepSpeed makes for itself the same limit: it passes no limit on."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # NCCL's own monitor ends a process without a word after 8 minutes in which a CUDA call hangs.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(480, round(timeout_seconds))))
    dist.distributed_c10d.default_pg_timeout = timeout
    if hasattr(dist.distributed_c10d, "default_pg_nccl_timeout"):
        dist.distributed_c10d.default_pg_nccl_timeout = timeout
