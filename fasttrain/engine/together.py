"""Work that a mistake ends on every process: nobody is left waiting for one that has gone."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError

T = TypeVar("T")
Item = TypeVar("Item")


def together(processes: Processes, work: Callable[[], T]) -> T:
    """What this process's work gives, once it has ended well on all of them. A collective; the work itself must hold none.

    Raises:
        UserError: the first process's that met one, on every process.
    """
    mistake: UserError | None = None
    try:
        done = work()
    except UserError as error:
        mistake = error
    first = next((theirs for theirs in processes.gather(mistake) if theirs is not None), None)
    if first is not None:
        raise first
    return done


def on_main(processes: Processes, work: Callable[[], T]) -> T | None:
    """What rank 0's work gives, and None elsewhere. See `together`."""
    return together(processes, lambda: work() if processes.is_main else None)


def divided(processes: Processes, items: Sequence[Item], work: Callable[[Sequence[Item]], T]) -> list[T]:
    """What the work gives of each process's run of the items, in the items' order, on every process. A collective; the work holds none.

    With fewer items than processes, some are given none.
    """
    first, last = (len(items) * rank // processes.world_size for rank in (processes.rank, processes.rank + 1))
    return processes.gather(work(items[first:last]))
