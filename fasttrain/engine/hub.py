"""Rank 0's ear: every rank's watchdog connects to it, says once a second that it lives and what it does, and hears the verdict from it.

One thread serves all connections. Who cannot say the run's token within some seconds is sent away: the token keeps strangers and other
runs out, it is no secret from who can read the network. Messages (see `Channel`), of a rank:

    {"token", "rank", "place", "pid", "machine"}    first, once
    {"what", "step", "number", "age"}               a beat
    {"status", "told"}                              an error ends this rank
    {"left": true}                                  a goodbye: the end of its connection means nothing now; answered by the same
    {"seen": true}                                  it has the verdict
    {"verdict": ...}                                it has given up rank 0

and of the hub: {} (it lives), {"verdict": ...}.
"""

import hmac
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from fasttrain.engine.channel import Channel, GarbledError
from fasttrain.engine.verdict import Failure, Member, Verdict, judge

GREETING_SECONDS = 5.0
MOST_STRANGERS = 64
LONGEST_GREETING = 2048
LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}


class Hub:
    """Listens to all ranks from a thread of rank 0 until `close`, and judges.

    Args:
        address: as the ranks are told to find rank 0; on the loopback nobody else can connect.
        limit, patience: see `judge`.
        beat: seconds between two beats.

    Attributes:
        port, token: what the ranks need to connect.
        verdict: who is at fault; None while all is well.
    """

    def __init__(self, world_size: int, address: str, limit: float, patience: Mapping[str, float], beat: float):
        self._server = _listen(LOOPBACK.get(address))
        self.port: int = self._server.getsockname()[1]
        self.token = secrets.token_hex(16)
        self.verdict: Verdict | None = None
        self._limit, self._patience, self._beat = limit, patience, beat
        now = time.monotonic()
        self._members = {rank: Member(rank, heard=now, began=now) for rank in range(world_size)}
        self._channels: dict[int, Channel] = {}
        self._strangers: dict[Channel, float] = {}
        self._seen: set[int] = set()
        self._suspected: tuple[tuple[int, ...], float] | None = None  # ranks that seem stuck, and since when
        self._all_seen, self._all_left, self._over = threading.Event(), threading.Event(), threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="fasttrain-hub", daemon=True)
        self._thread.start()

    def wait_left(self) -> None:
        """Waits until every rank has said goodbye. Whatever keeps one from it ends this process by a verdict."""
        self._all_left.wait()

    def wait_seen(self, seconds: float) -> None:
        """Waits until every living rank has the verdict."""
        self._all_seen.wait(seconds)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for channel in [*self._channels.values(), *self._strangers]:
            channel.close()
        self._selector.close()
        self._server.close()

    def _serve(self) -> None:
        looked = pulsed = time.monotonic()
        while not self._over.is_set():
            for key, _ in self._selector.select(self._beat / 4):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if now - looked > self._limit / 2:
                self._forgive(now - looked)
            looked = now
            if now - pulsed >= self._beat:
                pulsed = now
                self._tell({})
                self._send_away(now)
            self._judge(now)

    def _forgive(self, seconds: float) -> None:
        """This process was not running itself for so long: that nothing was heard meanwhile is nobody's fault."""
        for member in self._members.values():
            member.heard += seconds
            member.began += seconds

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        if len(self._strangers) >= MOST_STRANGERS:
            connection.close()
            return
        channel = Channel(connection)
        self._strangers[channel] = time.monotonic()
        self._selector.register(channel, selectors.EVENT_READ, channel)

    def _send_away(self, now: float) -> None:
        for channel in [channel for channel, since in self._strangers.items() if now - since > GREETING_SECONDS]:
            self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        self._selector.unregister(channel)
        self._strangers.pop(channel, None)
        channel.close()

    def _hear(self, channel: Channel) -> None:
        member = next((self._members[rank] for rank, known in self._channels.items() if known is channel), None)
        try:
            messages = channel.receive() if member else channel.receive(LONGEST_GREETING)
            for message in messages:
                member = self._note(member, message) if member else self._greet(channel, message)
        except (GarbledError, KeyError, TypeError, ValueError):
            channel.closed = True
        if channel.closed:
            self._forget(channel)
            if member is not None and member.here:
                member.state, member.heard = "died", time.monotonic()

    def _greet(self, channel: Channel, message: dict[str, Any]) -> Member:
        """Who says the token is the rank that it says it is."""
        if not hmac.compare_digest(str(message["token"]).encode(), self.token.encode()):
            raise ValueError("a wrong token")
        member = self._members[int(message["rank"])]
        if member.state != "expected":
            raise ValueError("a rank that is here already")
        self._strangers.pop(channel, None)
        self._channels[member.rank] = channel
        now = time.monotonic()
        member.state, member.heard, member.began = "alive", now, now
        member.place, member.pid, member.machine = str(message["place"]), int(message["pid"]), str(message["machine"])
        if self.verdict is not None:
            channel.send({"verdict": self.verdict.plain()})
        return member

    def _note(self, member: Member, message: dict[str, Any]) -> Member:
        member.heard = time.monotonic()
        if "what" in message:
            member.what, member.step, member.number = str(message["what"]), int(message["step"]), int(message["number"])
            member.began = member.heard - float(message["age"])
        elif "status" in message:
            member.failure = Failure(int(message["status"]), str(message["told"]), member.heard)
        elif message.get("left"):
            member.state = "left"
            self._channels[member.rank].send({"left": True})
            if all(other.state == "left" for other in self._members.values()):
                self._all_left.set()
        elif message.get("seen"):
            self._seen.add(member.rank)
        elif "verdict" in message and self.verdict is None:
            self._pronounce(Verdict.of(message["verdict"]))
        return member

    def _judge(self, now: float) -> None:
        if self.verdict is None:
            verdict = judge(self._members.values(), now, self._limit, self._patience)
            if self._confirmed(verdict, now) and verdict is not None:
                self._pronounce(verdict)
        if self.verdict is not None:
            waited_for = {member.rank for member in self._members.values() if member.state == "alive"}
            silent = set(self.verdict.ranks) if self.verdict.cause == "silent" else set()
            if waited_for - silent <= self._seen:
                self._all_seen.set()

    def _confirmed(self, verdict: Verdict | None, now: float) -> bool:
        """A rank's last words are up to a beat old: it may have gone on since. Who is stuck still is two beats later."""
        stuck = verdict.ranks if verdict is not None and verdict.cause == "stuck" else None
        if stuck is None or self._suspected is None or self._suspected[0] != stuck:
            self._suspected = None if stuck is None else (stuck, now)
        return self._suspected is None or now - self._suspected[1] > 2 * self._beat

    def _pronounce(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self._tell({"verdict": verdict.plain()})

    def _tell(self, message: dict[str, Any]) -> None:
        for rank, channel in self._channels.items():
            if self._members[rank].state != "died" and not channel.closed:
                channel.send(message)


def _listen(loopback: str | None) -> socket.socket:
    if loopback is not None:
        family = socket.AF_INET6 if ":" in loopback else socket.AF_INET
        return socket.create_server((loopback, 0), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)
