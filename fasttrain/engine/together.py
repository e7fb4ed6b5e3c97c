"""Work that a mistake ends on every process: nobody is left waiting for one that has gone."""

from collections.abc import Callable
from typing import TypeVar

from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError

T = TypeVar("T")


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
