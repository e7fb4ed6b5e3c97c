"""Training from a web server: the same run, bit for bit, whatever the server does, and a clear end where it is gone."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml

from fasttrain.errors import Status
from tests.commands import fasttrain
from tests.http_server import Faults, FaultyServer
from tests.runs import plain_config
from tests.shards import write_random

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six images of noise in a few shards."""
    return write_random(tmp_path_factory.mktemp("stored") / "set", "image", SHAPE, classes=2)


def write_config(tmp_path: Path, name: str, train: str, **data: object) -> Path:
    keys = {"train": train, "streams": 1, "window_shards": 1, "cache": str(tmp_path / "cache"), "retry_seconds": 20, **data}
    sections = {"data": keys, "training": {"steps": 6, "global_batch": 4}}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plain_config(tmp_path / name, train, **sections)))
    return path


def losses(run: Path) -> list[float]:
    return [loss for line in (run / "metrics.jsonl").read_text().splitlines() for loss in json.loads(line).get("losses", [])]


def trained(tmp_path: Path, name: str, train: str, **data: object) -> list[float]:
    done = fasttrain("train", write_config(tmp_path, name, train, **data))
    assert done.status == 0, done.err
    return losses(tmp_path / name)


@pytest.fixture(scope="module")
def here(folder, tmp_path_factory) -> list[float]:
    """The losses of the run that reads the folder itself."""
    return trained(tmp_path_factory.mktemp("here"), "here", str(folder))


def test_a_run_from_a_faulty_server_is_the_run_from_the_folder(folder, here, tmp_path):
    with FaultyServer(folder, Faults(latency=0.02, drops=0.3, busy=0.2, seed=1)) as server:
        there = trained(tmp_path, "there", server.url)
        assert len(server.requests) > len(list(folder.iterdir())), "no request failed, so nothing was tested"
    assert here == there and len(here) == 6


def test_a_cache_smaller_than_the_set_changes_nothing(digits, tmp_path):
    shards = [path.stat().st_size for path in digits.glob("*.tar")]
    bound = 2.2 * max(shards) + 100_000
    assert len(shards) > 2 and bound < sum(shards), "the whole set fits, so nothing is tested"
    keys = {"data": {"streams": 1, "window_shards": 1}, "training": {"steps": 4, "global_batch": 900}}
    with FaultyServer(digits) as server:
        remote = {"data": {**keys["data"], "cache": str(tmp_path / "cache"), "cache_gib": bound / 2**30}}
        both = [_losses_of(tmp_path / "here", digits, keys), _losses_of(tmp_path / "there", server.url, {**keys, **remote})]
        assert max(server.count(path.name) for path in digits.glob("*.tar")) > 1, "nothing was evicted"
    assert both[0] == both[1] and len(both[0]) == 4


def _losses_of(run: Path, train: Path | str, sections: dict[str, dict[str, object]]) -> list[float]:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(plain_config(run, train, **sections)))
    done = fasttrain("train", path)
    assert done.status == 0, done.err
    return losses(run)


def test_a_cached_shard_that_was_damaged_is_fetched_anew(folder, here, tmp_path):
    with FaultyServer(folder) as server:
        trained(tmp_path, "first", server.url)
        for path in (tmp_path / "cache" / "files").glob("*.tar"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        again = trained(tmp_path, "again", server.url)
        assert {server.count(path.name) for path in folder.glob("*.tar")} == {2}
    assert again == here


def test_a_shard_that_the_server_has_damaged_is_damage(folder, tmp_path):
    stored = Path(shutil.copytree(folder, tmp_path / "stored"))
    shard = max(stored.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1024])
    with FaultyServer(stored) as server:
        done = fasttrain("train", write_config(tmp_path, "run", server.url, max_damaged=0.9))
        assert done.status == 0, done.err
        assert shard.name in done.out + done.err and "cut short" in done.out + done.err
        assert server.count(shard.name) == 3, "it was not tried anew, or too often"


def test_a_shard_that_is_missing_is_damage(folder, tmp_path):
    missing = max(path.name for path in folder.glob("*.tar"))
    with FaultyServer(folder, Faults(statuses={missing: 404})) as server:
        done = fasttrain("train", write_config(tmp_path, "run", server.url, max_damaged=0.9))
        assert done.status == 0 and f"{missing}" in done.out + done.err, done.err
        done = fasttrain("train", write_config(tmp_path, "strict", server.url))
    assert done.status == Status.USER_ERROR and "max_damaged" in done.err


def test_a_server_that_dies_stops_the_run(folder, tmp_path):
    with FaultyServer(folder) as server:
        server.faults = Faults(statuses={path.name: 500 for path in folder.glob("*.tar")})
        done = fasttrain("train", write_config(tmp_path, "run", server.url, retry_seconds=1.0))
    assert done.status == Status.RESTART and "data.retry_seconds" in done.err and "shard-0000" in done.err


def test_a_dry_run_reads_from_a_server(folder, tmp_path):
    with FaultyServer(folder) as server:
        done = fasttrain("train", write_config(tmp_path, "run", server.url), "--dry-run")
    assert done.status == 0 and "dry run done" in done.out, done.err


def _cache_in(folder: Path) -> None:
    os.environ["FASTTRAIN_CACHE"] = str(folder / "cache")


def test_an_evaluation_takes_its_reference_from_a_server(digits, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain_config(tmp_path / "run", digits, training={"steps": 1, "global_batch": 16})))
    assert fasttrain("train", path).status == 0
    with FaultyServer(digits, Faults(drops=0.2, seed=2)) as server:
        few = ("--count", "80", "--steps", "2")
        done = fasttrain("evaluate", tmp_path / "run", "--reference", server.url, *few, before=partial(_cache_in, tmp_path))
        assert done.status == 0 and "1797 reference images" in done.out, done.err
        done = fasttrain("evaluate", tmp_path / "run", "--reference", f"{server.url}?token=s3cr3t", *few)
    assert done.status == Status.USER_ERROR and "netrc" in done.err and "s3cr3t" not in done.out + done.err
