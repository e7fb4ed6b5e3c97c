"""One training at a time in a run folder: rank 0 holds a lock that the kernel takes back when it dies, however it dies."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError

WAIT_SECONDS = 30.0  # the run before may be dying
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def locked(run_dir: Path, processes: Processes, seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Holds RUN/lock for the block's life; empty when nobody does. A collective.

    Args:
        seconds: how long to wait for another training in the same folder to end.

    Raises:
        UserError: it does not end, or the folder cannot be written to; on all ranks.
    """
    descriptor, problem = None, None
    if processes.is_main:
        try:
            descriptor = _acquire(run_dir, seconds)
        except UserError as error:
            problem = str(error)
    try:
        if told := processes.from_main(problem):
            raise UserError(told)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _acquire(run_dir: Path, seconds: float) -> int:
    """The open file that holds the lock. Never deleted: who waits for it has it open as well."""
    path = run_dir / "lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot write there: {error.strerror}") from None
    if not _taken(descriptor, path, seconds):
        holder = _holder(descriptor)
        os.close(descriptor)
        raise UserError(f"{run_dir} is being trained in by {holder}: stop that first, or choose another run_dir")
    _sign(descriptor)
    return descriptor


def _taken(descriptor: int, path: Path, seconds: float) -> bool:
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            if not told:
                told = True
                print(f"{path.parent} is still held by {_holder(descriptor)}: waiting up to {seconds:.0f} s for its end", flush=True)
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise UserError(f"{path} cannot be locked: {error.strerror}") from None
            print(f"{path}: this file system has no locks; see to it that no two trainings share the folder", file=sys.stderr, flush=True)
            return True


def _sign(descriptor: int) -> None:
    """Writes who holds it, for the message to others; on a full disk they read nothing, and the lock holds all the same."""
    signature = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(signature).encode() + b"\n", 0)
    except OSError:
        pass


def _holder(descriptor: int) -> str:
    try:
        signed = json.loads(os.pread(descriptor, 1024, 0))
        return f"pid {int(signed['pid'])} on {str(signed['host'])[:100]!r} since {str(signed['since'])[:40]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
