"""The cache: shared by processes, bounded, trusted only where whole, and left clean by the killed."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fasttrain.data.config import DataConfig
from fasttrain.data.remote.cache import Cache
from fasttrain.data.remote.store import RENEWALS, open_files
from fasttrain.errors import Status, UserError
from tests.data.remote.conftest import SIZES
from tests.http_server import Faults, FaultyServer

_fork = multiprocessing.get_context("forkserver")
MIB = 2**20


def cached(folder: Path) -> list[Path]:
    """The whole files of a cache."""
    return [path for path in sorted((folder / "cache" / "files").glob("*-*")) if not path.name.startswith("draft-")]


def drafts(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "files").glob("draft-*"))


def _ask(url: str, cache: str, name: str, results) -> None:
    files = open_files(url, DataConfig(train=url, cache=cache, retry_seconds=20))
    results.put(files.path(name).read_bytes())


def started(server: FaultyServer, folder: Path, name: str = "a.tar"):
    """A process that fetches a file, and what it will have read."""
    results = _fork.SimpleQueue()
    process = _fork.Process(target=_ask, args=(server.url, str(folder / "cache"), name, results), daemon=True)
    process.start()
    return process, results


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def test_processes_share_one_download(server, stored, tmp_path):
    server.faults = Faults(bytes_per_second=400_000)
    pairs = [started(server, tmp_path) for _ in range(3)]
    for process, results in pairs:
        assert results.get() == (stored / "a.tar").read_bytes()
        process.join()
    assert server.count("a.tar") == 1


def test_a_killed_download_is_not_trusted_and_leaves_nothing(server, stored, tmp_path, opened):
    server.faults = Faults(bytes_per_second=100_000)
    process, _ = started(server, tmp_path)
    until(lambda: any(path.stat().st_blocks for path in drafts(tmp_path)))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert drafts(tmp_path) and not cached(tmp_path)
    server.faults = Faults()
    files = opened(server.url)
    assert not drafts(tmp_path), "the next process to open the cache clears up"
    assert files.path("a.tar").read_bytes() == (stored / "a.tar").read_bytes()


def test_who_waited_for_a_killed_process_fetches_for_itself(server, stored, tmp_path, opened):
    server.faults = Faults(bytes_per_second=100_000)
    files = opened(server.url)
    process, _ = started(server, tmp_path)
    until(lambda: bool(drafts(tmp_path)))
    threading.Timer(0.3, lambda: (setattr(server, "faults", Faults()), os.kill(process.pid, signal.SIGKILL))).start()
    assert files.path("a.tar").read_bytes() == (stored / "a.tar").read_bytes()
    assert server.count("a.tar") == 2
    process.join()


def test_the_least_recently_used_goes_first(server, tmp_path, opened):
    files = opened(server.url, mib=700_100 / MIB)  # any two fit
    for name, age in (("a.tar", 100), ("b.tar", 50)):
        now = time.time()
        os.utime(files.path(name), (now - age, now - age))
        files.release(name)
    files.path("a.tar")  # a use, which makes b the older one
    files.release("a.tar")
    files.path("c.tar")
    assert [path.name.partition("-")[2] for path in cached(tmp_path)].count("a.tar") == 1
    assert server.count("a.tar") == 1 and len(cached(tmp_path)) == 2


def test_what_is_held_stays_however_old_it_is(server, stored, tmp_path, opened):
    files = opened(server.url, mib=700_100 / MIB)  # any two fit
    held = files.path("a.tar")
    files.path("b.tar")
    files.release("b.tar")
    os.utime(held, (0, 0))  # the oldest, but in use
    files.path("c.tar")
    assert [path.name.partition("-")[2] for path in cached(tmp_path)].count("b.tar") == 0
    assert held.read_bytes() == (stored / "a.tar").read_bytes()
    assert sum(path.stat().st_size for path in cached(tmp_path)) <= 700_000


def test_the_bound_holds_at_every_moment_and_over_processes(server, tmp_path):
    server.faults = Faults(bytes_per_second=2_000_000)
    stop, most = threading.Event(), [0]

    def watch():
        cache = Cache(tmp_path / "cache" / "files", 900_000)
        while not stop.wait(0.002):
            with cache.alone():  # or a file that is renamed while we look counts twice
                sizes = [path.stat(follow_symlinks=False).st_size for path in cache.folder.iterdir()]
            most[0] = max(most[0], sum(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    readers = [_fork.Process(target=_read_round, args=(server.url, str(tmp_path / "cache"), number), daemon=True) for number in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    stop.set()
    watcher.join()
    assert 400_000 <= most[0] <= 900_000


def _read_round(url: str, cache: str, number: int) -> None:
    files = open_files(url, DataConfig(train=url, cache=cache, cache_gib=900_000 / 2**30, retry_seconds=20))
    names = ["a.tar", "b.tar", "c.tar"]
    for turn in range(9):
        name = names[(turn + number) % 3]
        assert files.path(name).stat().st_size == SIZES[name]
        files.release(name)


def test_a_file_that_can_never_fit_is_told_at_once(server, opened):
    with pytest.raises(UserError, match=r"data\.cache_gib.*does not fit") as caught:
        opened(server.url, mib=0.25).path("a.tar")
    assert caught.value.status == Status.USER_ERROR and server.count("a.tar") == 1


def test_a_cache_full_of_what_is_in_use_waits_and_then_tells(server, opened):
    files = opened(server.url, mib=660_000 / MIB, retry_seconds=0.5)
    files.path("a.tar")
    files.path("b.tar")
    with pytest.raises(UserError, match=r"are in use.*data\.cache_gib") as caught:
        files.path("c.tar")
    assert caught.value.status == Status.USER_ERROR
    threading.Timer(0.2, lambda: files.release("a.tar")).start()
    assert files.path("c.tar").stat().st_size == SIZES["c.tar"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 500 KiB."""
    folder = tmp_path / "cache"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_takes_from_the_cache_and_then_tells(server, opened, stored, small_disk):
    files = opened(server.url, retry_seconds=0.5)
    files.path("a.tar")
    with pytest.raises(UserError, match=r"the disk of .* is full.*data\.cache") as caught:
        files.path("b.tar")
    assert caught.value.status == Status.USER_ERROR
    files.release("a.tar")
    assert files.path("b.tar").read_bytes() == (stored / "b.tar").read_bytes()


def test_a_folder_that_cannot_be_used_is_told(tmp_path, opened):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache .*name a folder"):
        opened("http://localhost/x", cache=str(tmp_path / "file"))


def test_the_cache_goes_where_it_is_said(monkeypatch, tmp_path, opened):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "elsewhere"))
    opened("http://localhost/x", cache=None)
    assert (tmp_path / "elsewhere" / "files").is_dir()


def test_sets_with_the_same_names_do_not_meet(stored, tmp_path, opened):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.tar").write_bytes(b"another")
    with FaultyServer(tmp_path) as server:
        one, two = (opened(f"{server.url}/{name}").path("a.tar").read_bytes() for name in ("stored", "other"))
    assert one == (stored / "a.tar").read_bytes() and two == b"another"


def test_a_bad_copy_is_fetched_anew_a_few_times(server, stored, tmp_path, opened):
    files = opened(server.url)
    path = files.path("a.tar")
    path.write_bytes(b"damaged on the disk")
    assert files.renew("a.tar")
    assert files.path("a.tar").read_bytes() == (stored / "a.tar").read_bytes()
    assert [files.renew("a.tar") for _ in range(RENEWALS)] == [True] * (RENEWALS - 1) + [False]


def test_a_new_copy_of_another_process_is_not_thrown_away(server, tmp_path, opened):
    mine, other = opened(server.url), opened(server.url)
    mine.path("a.tar")
    other.path("a.tar")
    other.renew("a.tar")
    other.path("a.tar")
    mine.renew("a.tar")
    mine.path("a.tar")
    assert server.count("a.tar") == 2


def test_what_must_be_current_is_fetched_once_by_each_start(server, stored, opened):
    opened(server.url, fresh=("d.tar",)).path("d.tar")
    (stored / "d.tar").write_bytes(b"new")
    files = opened(server.url, fresh=("d.tar",))
    assert files.path("d.tar").read_bytes() == files.path("d.tar").read_bytes() == b"new"
    assert server.count("d.tar") == 2


def test_files_are_fetched_ahead(server, opened, tmp_path):
    files = opened(server.url)
    files.ahead(["a.tar", "b.tar", "nowhere.tar"])
    until(lambda: len(cached(tmp_path)) == 2)
    files.path("a.tar")
    files.path("b.tar")
    assert server.count("a.tar") == server.count("b.tar") == 1


def test_a_file_on_its_way_is_waited_for(server, stored, opened):
    server.faults = Faults(bytes_per_second=500_000)
    files = opened(server.url)
    files.ahead(["a.tar"])
    until(lambda: server.count("a.tar") == 1)
    assert files.path("a.tar").read_bytes() == (stored / "a.tar").read_bytes()
    assert server.count("a.tar") == 1


def test_what_is_no_longer_wanted_is_not_begun(server, opened):
    server.faults = Faults(latency=0.3)
    files = opened(server.url)
    files.ahead([f"{number}.tar" for number in range(20)])
    files.ahead(["a.tar"])
    until(lambda: server.count("a.tar") == 1)
    time.sleep(0.5)
    assert len(server.requests) <= 5


def test_no_more_is_fetched_ahead_than_a_share_of_the_cache(server, stored, opened, tmp_path):
    names = [f"n{number}.tar" for number in range(12)]
    for name in names:
        (stored / name).write_bytes(bytes(100_000))
    files = opened(server.url, mib=1_600_000 / MIB)  # a quarter is four files
    files.ahead(names)
    until(lambda: len(cached(tmp_path)) >= 4)
    files.ahead(names)
    time.sleep(0.3)
    assert len(cached(tmp_path)) == 4


def test_a_link_in_the_cache_is_not_followed(tmp_path, server, opened):
    files = opened(server.url)
    cache = Cache(tmp_path / "cache" / "files", 10 * MIB)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (cache.folder / f"draft-{cache.place(f'{server.url}/a.tar').name}").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        files.path("a.tar")
    assert victim.read_text() == "mine"
