"""Stores that are no web servers: fsspec's, and commands, which need leave."""

import importlib.util

import fsspec
import pytest

from fasttrain.errors import Status, UserError


@pytest.fixture
def memory(stored):
    system = fsspec.filesystem("memory")
    for path in stored.iterdir():
        system.pipe_file(f"/set/{path.name}", path.read_bytes())
    yield "memory://set"
    system.rm("/set", recursive=True)


def test_an_object_store(memory, stored, opened):
    files = opened(memory)
    for name in ("a.tar", "c.tar", "void.tar"):
        assert files.path(name).read_bytes() == (stored / name).read_bytes()
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.path("nowhere.tar")


def test_an_object_store_that_breaks_off_is_continued(memory, stored, opened, monkeypatch):
    read, calls = fsspec.implementations.memory.MemoryFile.read, []

    def broken(self, size=-1):
        calls.append(self.tell())
        if len(calls) == 2:
            raise ConnectionResetError("gone")
        return read(self, min(size, 100_000))

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", broken)
    assert opened(memory).path("a.tar").read_bytes() == (stored / "a.tar").read_bytes()
    assert calls[1] == calls[2] == 100_000


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed, so nothing is missing")
def test_a_missing_client_is_named(opened):
    with pytest.raises(UserError, match="s3fs"):
        opened("s3://bucket/set").path("a.tar")


@pytest.mark.parametrize("place", ["reference://x", "s3://a::http://b", "zip://a::http://host/x", "shell://x", "ftps://x"])
def test_other_schemes_are_refused(place, opened):
    with pytest.raises(UserError, match="cannot be opened; the schemes are http, https, s3") as caught:
        opened(place)
    assert caught.value.status == Status.USER_ERROR


def test_pipes_need_leave(opened):
    with pytest.raises(UserError, match=r"data\.allow_pipe: true"):
        opened("pipe:")


def test_a_pipe(stored, opened):
    assert opened("pipe:", allow_pipe=True).path(f"cat {stored}/a.tar").read_bytes() == (stored / "a.tar").read_bytes()


def test_a_pipe_that_fails_after_output_is_not_trusted(stored, opened, tmp_path):
    command = f"cat {stored}/a.tar; test -e {tmp_path}/second || {{ touch {tmp_path}/second; exit 3; }}"
    assert opened("pipe:", allow_pipe=True).path(command).read_bytes() == (stored / "a.tar").read_bytes()
    with pytest.raises(UserError, match=r"ended with status 3.*data\.retry_seconds"):
        opened("pipe:", allow_pipe=True, retry_seconds=0.3).path(f"cat {stored}/b.tar; exit 3")


def test_a_silent_pipe_is_ended(opened, monkeypatch):
    monkeypatch.setattr("fasttrain.data.remote.pipes.SILENCE", 0.2)
    with pytest.raises(UserError, match="wrote nothing"):
        opened("pipe:", allow_pipe=True, retry_seconds=0.3).path("sleep 60")
