"""A web server on this machine that is as slow and as faulty as it is told to be, for tests and benchmarks.

Faults fall by a digest of (seed, request number), so a run of requests meets the same ones each time.
"""

import re
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import Self

import xxhash

_CHUNK = 1 << 16


@dataclass
class Faults:
    """What goes wrong, and how slowly everything goes.

    Attributes:
        latency: seconds before each answer. bytes_per_second: of each connection (None: unlimited).
        drops: share of answers whose connection is cut at a random byte of the body.
        busy: share of requests answered with 503. retry_after: seconds, sent along with it.
        corrupt: share of answers with one bit of the body flipped.
        ranges: whether ranges are answered. length_off_by: added to each Content-Length.
        statuses: file name -> a status that is always answered. redirects: file name -> where it is said to be.
        logins: the only Authorization accepted, if any.
    """

    latency: float = 0.0
    bytes_per_second: float | None = None
    drops: float = 0.0
    busy: float = 0.0
    retry_after: int | None = None
    corrupt: float = 0.0
    ranges: bool = True
    length_off_by: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    login: str | None = None
    seed: int = 0


class FaultyServer:
    """Serves the files of a folder; a context manager. `faults` may be changed at any time.

    Attributes:
        url: the folder's address. requests: (file name, Range or None, Authorization or None) of each request.
    """

    def __init__(self, folder: Path, faults: Faults | None = None, port: int = 0):
        self.folder = folder
        self.faults = faults or Faults()
        self.requests: list[tuple[str, str | None, str | None]] = []
        self._lock = Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.owner = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def note(self, request: tuple[str, str | None, str | None]) -> int:
        """Keeps a request and returns its number."""
        with self._lock:
            self.requests.append(request)
            return len(self.requests)

    def chance(self, number: int, what: str) -> float:
        """A number in [0, 1) for this request and question."""
        return xxhash.xxh3_64_intdigest(f"{self.faults.seed} {number} {what}".encode()) / 2**64

    def count(self, name: str) -> int:
        """How often a file was asked for."""
        return sum(asked == name for asked, _, _ in self.requests)

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    owner: FaultyServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `requests`."""

    def do_GET(self) -> None:
        owner, faults = self.server.owner, self.server.owner.faults
        name = self.path.lstrip("/").partition("?")[0]
        number = owner.note((name, self.headers.get("Range"), self.headers.get("Authorization")))
        time.sleep(faults.latency)
        if faults.login and self.headers.get("Authorization") != faults.login:
            return self._answer_empty(HTTPStatus.UNAUTHORIZED)
        if name in faults.redirects:
            return self._answer_empty(HTTPStatus.FOUND, Location=faults.redirects[name])
        if name in faults.statuses:
            return self._answer_empty(faults.statuses[name])
        if owner.chance(number, "busy") < faults.busy:
            return self._answer_empty(503, **({"Retry-After": str(faults.retry_after)} if faults.retry_after is not None else {}))
        path = owner.folder / name
        if not path.is_file():
            return self._answer_empty(HTTPStatus.NOT_FOUND)
        return self._send_file(number, path.read_bytes())

    def _answer_empty(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, number: int, content: bytes) -> None:
        faults = self.server.owner.faults
        tag = f'"{xxhash.xxh3_64_hexdigest(content)}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and faults.ranges and self.headers.get("If-Range", tag) == tag else 0
        body = bytearray(content[start:])
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) + faults.length_off_by))
        self.end_headers()
        self._send_body(number, body)

    def _send_body(self, number: int, body: bytearray) -> None:
        owner, faults = self.server.owner, self.server.owner.faults
        if body and owner.chance(number, "corrupt") < faults.corrupt:
            body[int(owner.chance(number, "where") * len(body))] ^= 1
        dropped = owner.chance(number, "drop") < faults.drops
        stop = int(owner.chance(number, "cut") * len(body)) if dropped else len(body)
        for first in range(0, stop, _CHUNK):
            part = body[first : min(first + _CHUNK, stop)]
            self.wfile.write(part)
            if faults.bytes_per_second:
                time.sleep(len(part) / faults.bytes_per_second)
        if dropped or faults.length_off_by > 0:
            self.wfile.flush()
            self.close_connection = True
