"""The hub on real sockets: who may speak, what garbage does, and what its clients hear."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fasttrain.engine.channel import Channel, GarbledError
from fasttrain.engine.hub import Hub

LIMIT, BEAT = 2.0, 0.1


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(2, "127.0.0.1", LIMIT, {}, BEAT)
    yield hub
    hub.close()


def _connect(hub: Hub) -> Channel:
    return Channel(socket.create_connection(("127.0.0.1", hub.port), timeout=5))


def _rank(hub: Hub, rank: int) -> Channel:
    channel = _connect(hub)
    channel.send({"token": hub.token, "rank": rank, "place": f"host h{rank}", "pid": 1, "machine": "m"})
    return channel


def _beat(channel: Channel, number: int = 0) -> None:
    channel.send({"what": "data", "step": 1, "number": number, "age": 0.0})


def _hear(channel: Channel, word: str, seconds: float = 5.0) -> Any:
    """The next message with this word in it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for message in channel.receive():
            if word in message:
                return message[word]
        assert not channel.closed, "sent away"
        time.sleep(0.01)
    return None


def _sent_away(channel: Channel, seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not channel.closed:
        channel.receive()
        time.sleep(0.01)
    return channel.closed


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\x13\x37\n",
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"[1, 2, 3]\n",
        b"{}\n",
        b'{"token": "wrong", "rank": 1}\n',
        b'{"token": {"a": 1}, "rank": [1]}\n',
        b"[" * 100_000 + b"\n",
        b"x" * 100_000,
    ],
)
def test_strangers_are_sent_away_and_ranks_go_on(hub: Hub, garbage: bytes):
    ranks = [_rank(hub, rank) for rank in range(2)]
    connection = socket.create_connection(("127.0.0.1", hub.port), timeout=5)
    connection.sendall(garbage)
    assert _sent_away(Channel(connection))
    for channel in ranks:
        _beat(channel)
        assert not channel.receive() or not channel.closed
    time.sleep(3 * BEAT)
    assert hub.verdict is None


def test_a_whole_greeting_with_a_wrong_token_is_sent_away_and_takes_no_place(hub: Hub):
    stranger = _connect(hub)
    stranger.send({"token": "0" * len(hub.token), "rank": 1, "place": "elsewhere", "pid": 1, "machine": "m"})
    assert _sent_away(stranger)
    assert not _sent_away(_rank(hub, 1), 0.3)


def test_a_stranger_who_says_nothing_or_takes_a_rank_that_is_here(hub: Hub):
    mute, first = _connect(hub), _rank(hub, 0)
    time.sleep(0.2)
    assert _sent_away(_rank(hub, 0))
    assert not _sent_away(first, 0.2)
    assert not mute.closed
    assert hub.verdict is None


def test_more_strangers_than_there_is_room_for(hub: Hub):
    crowd = [_connect(hub) for _ in range(80)]
    time.sleep(0.3)
    assert sum(channel.receive() == [] and channel.closed for channel in crowd) >= 80 - 64
    for channel in crowd:
        channel.close()
    time.sleep(0.3)
    one = _rank(hub, 1)
    assert not _sent_away(one, 0.3)


def test_a_death_is_told_to_the_others(hub: Hub):
    one, other = _rank(hub, 0), _rank(hub, 1)
    _beat(one)
    _beat(other)
    time.sleep(0.2)
    other.close()
    verdict = _hear(one, "verdict")
    assert (verdict["cause"], verdict["ranks"], verdict["lowest"]) == ("died", [1], 0)
    assert "rank 1 (host h1)" in verdict["told"]


def test_a_goodbye_is_no_death(hub: Hub):
    one, other = _rank(hub, 0), _rank(hub, 1)
    for channel in (other, one):
        channel.send({"left": True})
        assert _hear(channel, "left")
        channel.close()
    waiter = threading.Thread(target=hub.wait_left, daemon=True)
    waiter.start()
    waiter.join(2)
    assert not waiter.is_alive()
    assert hub.verdict is None


def test_a_rank_that_never_comes_is_silent(hub: Hub):
    one = _rank(hub, 0)
    deadline = time.monotonic() + LIMIT + 2
    while hub.verdict is None and time.monotonic() < deadline:
        _beat(one, number=int(time.monotonic() * 100))
        time.sleep(0.05)
    assert hub.verdict is not None
    assert (hub.verdict.cause, hub.verdict.ranks) == ("silent", (1,))


def test_a_line_without_an_end():
    server = socket.create_server(("127.0.0.1", 0))
    client = Channel(socket.create_connection(server.getsockname()))
    connection, _ = server.accept()
    connection.sendall(b'{"a": 1}\n{"b"')
    time.sleep(0.1)
    assert client.receive() == [{"a": 1}]
    connection.sendall(b": 2}\n" + b"y" * 40_000)
    time.sleep(0.1)
    with pytest.raises(GarbledError, match="more than 16384 bytes"):
        client.receive()
