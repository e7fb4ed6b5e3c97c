"""Worker processes that never outlive the one that started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from fasttrain.errors import UserError


def run_jobs(job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Runs job(*arguments[i]) for all i in `workers` processes, and yields the results as they come; one worker is the caller itself.

    Raises:
        UserError: a process was killed. Whatever a job raises is raised here, and the jobs not yet begun are dropped.
    """
    if workers <= 1:
        for each in arguments:
            yield job(*each)
        return
    # Not fork: torch's threads do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(arguments) or 1), context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(job, *each) for each in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for want of memory; run the same command with fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: end it at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
