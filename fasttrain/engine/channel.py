"""A TCP connection that carries small JSON objects, a line each, and on which no side ever waits for the other."""

import json
import socket
import threading
from typing import Any

LONGEST_LINE = 16 << 10  # bytes; a beat has about 200
_MOST_UNSENT = 256 << 10


class GarbledError(Exception):
    """What came is not a line of JSON that holds an object, or is too long for one."""


class Channel:
    """One end of a connection. Several threads may send; one receives.

    Attributes:
        closed: whether the other end has gone: its process has ended, or the connection was reset.
    """

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closed = False
        self._connection = connection
        self._received, self._unsent = b"", b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message, or as much of it as the connection takes now and the rest with the next one."""
        with self._sending:
            if not self.closed and len(self._unsent) < _MOST_UNSENT:
                self._unsent += json.dumps(message, separators=(",", ":")).encode() + b"\n"
                self._flush()

    def receive(self, longest: int = LONGEST_LINE) -> list[dict[str, Any]]:
        """The messages that have come in; sets `closed` at the connection's end.

        Raises:
            GarbledError: something else came.
        """
        try:
            came = self._connection.recv(1 << 16)
            self.closed = self.closed or not came
        except BlockingIOError:
            came = b""
        except OSError:
            came, self.closed = b"", True
        *lines, self._received = (self._received + came).split(b"\n")
        if len(self._received) > longest or any(len(line) > longest for line in lines):
            raise GarbledError(f"a line of more than {longest} bytes")
        return [_read(line) for line in lines]

    def close(self) -> None:
        self.closed = True
        self._connection.close()

    def _flush(self) -> None:
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True


def _read(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise GarbledError("a line that is not JSON") from None
    if not isinstance(message, dict):
        raise GarbledError("a line that holds no JSON object")
    return message
