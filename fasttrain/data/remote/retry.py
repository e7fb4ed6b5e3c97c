"""Failures that pass: tried again with growing pauses, for a bounded time without progress."""

import logging
import threading
import time

import xxhash

from fasttrain.data.remote.addresses import shown
from fasttrain.errors import Status, UserError

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
TELL_AFTER = 5.0  # seconds without progress, before a failure that may pass is worth a line
_LOG = logging.getLogger(__name__)


class StoreError(UserError):
    """A store that failed for longer than `data.retry_seconds`: it may be back when the same command is started again."""

    status = Status.RESTART


class PassingError(Exception):
    """A failure that may be gone at the next try: a reset, a timeout, a busy server, a short read.

    Attributes:
        pause: seconds that the store asked to be left alone, if it did.
        becomes, remedy: what is raised when it does not pass, and what helps then.
    """

    becomes: type[UserError] = StoreError
    remedy = "start it again when the store answers"

    def __init__(self, told: str, pause: float | None = None):
        super().__init__(shown(told))
        self.pause = pause


class Patience:
    """How long one file's failures are borne: `seconds` since anything new came, by the monotonic clock.

    The pauses grow and are spread over processes and files, by a digest: no generator's state is touched.

    Args:
        what: the file, as messages name it.
        seconds: `data.retry_seconds`.
        stop: set when nobody waits for the file any more.
    """

    def __init__(self, what: str, seconds: float, stop: threading.Event):
        self._what = what
        self._seconds = seconds
        self._stop = stop
        self._failures = 0
        self._since = time.monotonic()
        self._told = False

    def progress(self) -> None:
        """Something new came: the time starts again."""
        self._failures = 0
        self._since = time.monotonic()

    def wait(self, failure: PassingError) -> None:
        """Pauses before the next try.

        Raises:
            UserError: the time is up (most often a StoreError), or nobody waits any more.
        """
        self._failures += 1
        borne = time.monotonic() - self._since
        if borne >= self._seconds or (failure.pause or 0) > self._seconds - borne:
            raise failure.becomes(
                f"{self._what}: {failure}; tried {self._failures} times in {borne:.0f} s without anything new, so the run stops "
                f"(data.retry_seconds); {failure.remedy}"
            )
        if borne > TELL_AFTER and not self._told:
            self._told = True
            _LOG.warning("%s: %s; tried again for up to %.0f s (data.retry_seconds)", self._what, failure, self._seconds)
        self._pass(max(failure.pause or 0.0, min(self._pause(), self._seconds - borne)))

    def watch(self, seconds: float) -> None:
        """Lets some time pass while another process fetches the file, which is progress."""
        self._pass(seconds)
        self.progress()

    def _pass(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise StoreError(f"{self._what}: given up, because the reader was closed")

    def _pause(self) -> float:
        grown = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures - 1, 16))
        # Thread and process take part, so that those who failed together do not come back together.
        key = f"{self._what} {self._failures} {threading.get_native_id()}"
        spread = xxhash.xxh3_64_intdigest(key.encode()) / 2**64
        return grown * (0.5 + spread / 2)
