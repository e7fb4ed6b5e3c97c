"""Ctrl-C and SIGTERM: before training begins they end the process at once, from then on they ask it to save and stop."""

import signal
from types import FrameType


class Stopped(SystemExit):
    """A signal ended the process before there was anything to save; nothing was written by halves."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.told = f"stopped by {signal.Signals(number).name} before training began; run the same command to start again"


class Stop:
    """A request to stop.

    Attributes:
        number: of the signal that asked; 0 while none has.
    """

    def __init__(self) -> None:
        self.number = 0
        self._noted_only = False

    @property
    def status(self) -> int:
        """What a process ends with that this request ended."""
        return 128 + self.number if self.number else 0

    def listen(self) -> None:
        """Takes SIGINT and SIGTERM for requests, for as long as the process lives: launchers repeat SIGTERM while a checkpoint is saved."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def only_note(self) -> None:
        """From here on a request is only noted, for who looks at `number`; a second Ctrl-C ends the process, whatever it does."""
        self._noted_only = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        first, self.number = not self.number, self.number or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first and not self._noted_only:
            raise Stopped(number)
