"""Fetching from a real web server that drops, refuses, corrupts, redirects and lies."""

import logging
import threading
import time

import pytest

from fasttrain.data.remote import http
from fasttrain.errors import Status, UserError
from tests.data.remote.conftest import SIZES
from tests.http_server import Faults, FaultyServer


@pytest.fixture(autouse=True)
def _no_login(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def same(files, server, names=SIZES):
    return all(files.path(name).read_bytes() == (server.folder / name).read_bytes() for name in names)


def test_whole_files_come_through_and_are_fetched_once(server, opened):
    files = opened(server.url)
    assert same(files, server) and same(files, server)
    assert same(opened(server.url), server)
    assert len(server.requests) == len(SIZES)


def test_drops_are_continued_where_they_broke_off(server, opened):
    server.faults = Faults(drops=0.8, seed=3)
    assert same(opened(server.url, retry_seconds=30), server)
    assert any(asked for _, asked, _ in server.requests), "no transfer was continued, so nothing was tested"


def test_drops_without_ranges_start_over(server, opened):
    server.faults = Faults(drops=0.6, ranges=False, seed=3)
    assert same(opened(server.url, retry_seconds=30), server)
    assert len(server.requests) > len(SIZES)


def test_a_file_that_changed_between_two_tries_is_not_mixed(server, opened, monkeypatch):
    server.faults = Faults(drops=1.0, seed=1)
    new = b"new" * 100_000
    wait = threading.Event()

    def replaced_meanwhile():
        while not server.requests:
            time.sleep(0.01)
        time.sleep(0.03)
        (server.folder / "a.tar").write_bytes(new)
        server.faults = Faults()
        wait.set()

    threading.Thread(target=replaced_meanwhile).start()
    assert opened(server.url, retry_seconds=30).path("a.tar").read_bytes() == new
    assert wait.is_set() and len(server.requests) > 1


def test_a_busy_server_is_asked_again_when_it_says(server, opened):
    server.faults = Faults(busy=1.0, retry_after=1)
    threading.Timer(0.5, lambda: setattr(server, "faults", Faults())).start()
    start = time.monotonic()
    opened(server.url).path("d.tar")
    assert time.monotonic() - start >= 1
    assert server.count("d.tar") == 2


def test_a_missing_file_is_missing_at_once(server, opened):
    files = opened(server.url)
    with pytest.raises(FileNotFoundError, match="404"):
        files.path("nowhere.tar")
    assert server.count("nowhere.tar") == 1


def test_a_refusal_is_told_at_once_with_its_remedy(server, opened):
    server.faults = Faults(statuses={"a.tar": 403})
    with pytest.raises(UserError, match=r"403.*netrc") as caught:
        opened(server.url).path("a.tar")
    assert caught.value.status == Status.USER_ERROR and server.count("a.tar") == 1


@pytest.mark.parametrize("faults", [Faults(busy=1.0), Faults(length_off_by=7), Faults(drops=1.0, ranges=False, latency=0.01)])
def test_a_failure_that_does_not_pass_ends_after_retry_seconds(server, opened, faults, caplog):
    server.faults = faults
    start = time.monotonic()
    with pytest.raises(UserError, match=r"d\.tar.*data\.retry_seconds") as caught:
        opened(server.url, retry_seconds=1.0).path("d.tar")
    assert caught.value.status == Status.RESTART
    assert time.monotonic() - start < 5 and server.count("d.tar") > 1


def test_a_server_that_is_gone_ends_after_retry_seconds(server, opened):
    files = opened(server.url, retry_seconds=0.5)
    server._server.shutdown()
    server._server.server_close()
    with pytest.raises(UserError, match=r"no connection.*data\.retry_seconds"):
        files.path("a.tar")


def test_a_long_failure_is_told_while_it_lasts(server, opened, monkeypatch, caplog):
    monkeypatch.setattr("fasttrain.data.remote.retry.TELL_AFTER", 0.2)
    server.faults = Faults(busy=1.0)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError):
        opened(server.url, retry_seconds=1.0).path("a.tar")
    assert len(caplog.records) == 1 and "a.tar: the server answered 503" in caplog.text


def test_a_silent_server_is_left(server, opened, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT", 0.2)
    server.faults = Faults(latency=2.0)
    start = time.monotonic()
    with pytest.raises(UserError, match="retry_seconds"):
        opened(server.url, retry_seconds=0.5).path("a.tar")
    assert time.monotonic() - start < 2


def test_redirects_are_followed_on_the_web_only(server, stored, opened):
    with FaultyServer(stored) as other:
        server.faults = Faults(redirects={"a.tar": f"{other.url}/b.tar?sig=s3cr3t", "c.tar": f"file://{stored}/c.tar"})
        files = opened(server.url)
        assert files.path("a.tar").read_bytes() == (stored / "b.tar").read_bytes()
        with pytest.raises(UserError, match="302 Found: it sends on to an address that is not on the web"):
            files.path("c.tar")


def test_a_signed_redirect_stays_out_of_messages(server, stored, opened):
    with FaultyServer(stored, Faults(busy=1.0)) as other:
        server.faults = Faults(redirects={"a.tar": f"{other.url}/b.tar?sig=s3cr3t"})
        with pytest.raises(UserError) as caught:
            opened(server.url, retry_seconds=0.3).path("a.tar")
    assert "s3cr3t" not in str(caught.value)


def test_logins_come_from_netrc_and_stay_with_their_host(server, stored, opened, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cr3t\n")
    with FaultyServer(stored) as other:
        there = other.url.replace("127.0.0.1", "localhost")
        server.faults = Faults(login="Basic bWU6czNjcjN0", redirects={"b.tar": f"{there}/b.tar"})
        files = opened(server.url)
        files.path("a.tar")
        files.path("b.tar")
        assert [login for _, _, login in other.requests] == [None]


def test_waiting_for_a_dead_store_ends_with_the_reader(server, opened):
    server.faults = Faults(busy=1.0)
    files, ended = opened(server.url, retry_seconds=60), threading.Event()

    def ask():
        with pytest.raises(UserError, match="closed"):
            files.path("a.tar")
        ended.set()

    threading.Thread(target=ask).start()
    time.sleep(0.3)
    files.close()
    assert ended.wait(5)
