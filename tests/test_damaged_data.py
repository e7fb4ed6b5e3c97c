"""Whole runs over damaged and foreign data: the same on any number of ranks, told once, counted in the records."""

import itertools
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fasttrain.data.config import DataConfig
from fasttrain.data.loader import training_loader
from fasttrain.data.shards import ShardSet
from fasttrain.engine.distributed import Processes
from tests.commands import fasttrain
from tests.labelled_images import SIDE, told_apart, write_set
from tests.ranks import run_ranks
from tests.runs import plain_config

STRIDE = 2048  # bytes of a digit in its shard


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))


def _config(folder: Path, shards: object, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(plain_config(folder / "run", str(shards), **sections)))
    return path


def test_a_run_over_damaged_data_tells_it_and_goes_on(tmp_path: Path, digits: Path):
    shards = Path(shutil.copytree(digits, tmp_path / "shards"))
    os.truncate(shards / "shard-00001.tar", 590 * STRIDE)
    config = _config(tmp_path, shards, data={"train": str(shards), "max_damaged": 0.02}, training={"steps": 113})
    done = fasttrain("train", config, "log.every=50")
    assert done.status == 0, done.err
    assert done.out.count("damaged data: shard-00001.tar: 9 of 599 samples unreadable (cut short: 1208320 of") == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["samples_replaced"] == 9, "1,808 positions: an epoch and eleven more"
    again = fasttrain("train", config, "training.steps=114")
    assert again.status == 0 and again.out.count("shard-00001.tar: 9 of 599") == 1
    (told,) = [json.loads(line) for line in (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()]
    assert (told["shard"], told["unreadable"], told["step"]) == ("shard-00001.tar", 9, 0)


def _epoch(processes: Processes, folder: str, samples: int) -> dict[int, tuple[int, int, bool]]:
    """What a rank sees of an epoch: sample, number shown and whether the label is its own, by position."""
    config = DataConfig(train=folder, size=SIDE, streams=4, window_shards=2, max_damaged=1)
    seen = {}
    with training_loader(config, ShardSet.open(folder, config), torch.tensor(3)) as loader:
        for batch in itertools.islice(loader.batches(0, 1, processes.rank, processes.world_size), -(-samples // processes.world_size)):
            pixels = ((batch.x0(torch.tensor(3)) + 1) * 127.5).round().numpy()
            ((number, own),) = told_apart(pixels, batch.cond.labels.numpy())
            seen[int(batch.position)] = (int(batch.sample_id), number, own)
    return seen


@pytest.mark.parametrize(("world", "counts"), [(3, [7, 0, 3, 11, 5, 1, 9]), (4, [5, 8])])
def test_uneven_shards_and_more_ranks_than_shards(tmp_path: Path, world: int, counts: list[int]):
    """All ranks index the set together; nothing is lost or seen twice, and a cut shard costs what was in it."""
    folder, samples = write_set(tmp_path / "set", counts, ("png", "jpg")), sum(counts)
    shares = run_ranks(world, _epoch, str(folder), samples)
    seen = {position: what for share in shares for position, what in share.items()}
    assert all(number == sample and own for sample, number, own in seen.values())
    assert sorted(seen[position][0] for position in range(samples)) == list(range(samples))
    first = folder / "train-00000.tar"
    os.truncate(first, first.stat().st_size // 2)
    damaged = run_ranks(world, _epoch, str(folder), samples)
    merged = {position: what for share in damaged for position, what in share.items()}
    assert all(number == sample and own for sample, number, own in merged.values())
    lost = set(range(samples)) - {sample for sample, _, _ in merged.values()}
    assert lost <= set(range(counts[0]))
    assert {position for position in merged if merged[position] != seen[position]} == {p for p in seen if seen[p][0] in lost}


def test_training_sampling_and_scoring_over_shards_made_elsewhere(tmp_path: Path):
    folder = write_set(tmp_path / "set", [20, 13], ("jpg", "png"))
    model = {"patch": 8, "width": 16}
    data = {"train": f"{folder}/train-{{00000..00001}}.tar", "size": SIDE, "threads": 2, "flip": True}
    config = _config(tmp_path, folder, data=data, model=model, training={"steps": 4})
    done = fasttrain("train", config)
    assert done.status == 0, done.err
    index = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (index["layout"], index["samples"], index["num_classes"]) == ("members", 33, 10)
    done = fasttrain("train", config, "training.steps=6")
    assert done.status == 0 and "continuing from step-00000004" in done.out
    done = fasttrain("sample", tmp_path / "run", "--out", tmp_path / "out", "--count", "4", "--steps", "2")
    assert done.status == 0, done.err
    os.truncate(folder / "train-00001.tar", 100)
    done = fasttrain("train", config, "training.steps=8")
    assert done.status == 2 and "13 of 33 samples are unreadable" in done.err and "train-00001.tar" in done.err
    done = fasttrain("train", config, "training.steps=8", "data.max_damaged=0.5")
    assert done.status == 0 and "13 of 13 samples unreadable (cut short: 100 of" in done.out


def test_a_set_without_classes_trains(tmp_path: Path):
    folder = write_set(tmp_path / "set", [6])
    (tmp_path / "plain").mkdir()
    with tarfile.open(folder / "train-00000.tar") as tar, tarfile.open(tmp_path / "plain" / "a.tar", "w") as out:
        for member in tar:
            if member.name.endswith("png"):
                out.addfile(member, tar.extractfile(member))
    sections = {"data": {"train": str(tmp_path / "plain"), "size": SIDE}, "model": {"patch": 8, "width": 16}, "training": {"steps": 2}}
    done = fasttrain("train", _config(tmp_path, folder, **sections))
    assert done.status == 0, done.err
