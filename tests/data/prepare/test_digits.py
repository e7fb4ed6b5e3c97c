"""The embedded default: real digits, as valid WebDataset shards, byte for byte the same each time."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from sklearn.datasets import load_digits

from fasttrain.data.prepare import digits
from fasttrain.data.prepare.digits import prepare_digits
from fasttrain.data.shards import ShardSet

from ..conftest import contents


def test_all_digits_are_there(prepared_digits: Path):
    arrays, labels, _ = ShardSet.open(prepared_digits).gather(np.arange(1797))
    stored = load_digits()
    pairs = sorted((a.tobytes(), label) for a, label in zip(arrays, labels.tolist(), strict=True))
    expected = np.rint(stored.images * 255 / 16).astype(np.uint8)
    assert pairs == sorted((a.tobytes(), label) for a, label in zip(expected, stored.target.tolist(), strict=True))


def test_stock_webdataset_reads_the_same(prepared_digits: Path):
    shards = ShardSet.open(prepared_digits)
    urls = [str(prepared_digits / shard.file) for shard in shards.index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    arrays, labels, _ = shards.gather(np.arange(1797))
    np.testing.assert_array_equal(np.stack([sample["npy"] for sample in samples]), arrays)
    assert [sample["cls"] for sample in samples] == labels.tolist()
    assert [int(sample["__key__"]) for sample in samples] == list(range(1797))


def test_twice_gives_the_same_bytes(prepared_digits: Path, tmp_path: Path):
    prepare_digits(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(prepared_digits)


def test_shards_mix_the_classes(prepared_digits: Path):
    labels = ShardSet.open(prepared_digits).labels.reshape(3, 599)
    for shard in labels:
        assert np.bincount(shard, minlength=10).min() > 40  # 60 of each on average


def test_a_damaged_shard_is_made_again_by_the_same_command(digits: Path, prepared_digits: Path):
    (digits / "shard-00000.tar").unlink()
    path = digits / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    kept = (digits / "shard-00002.tar").stat().st_mtime_ns
    assert prepare_digits(digits).made == 2 * 599
    assert contents(digits) == contents(prepared_digits)
    assert (digits / "shard-00002.tar").stat().st_mtime_ns == kept


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    digits.add_arguments(parser)
    digits.run(parser.parse_args([str(tmp_path / "out")]))
    assert "1,797 samples of 1x8x8, 10 classes, 3 shards" in capsys.readouterr().out


def test_no_path_of_this_machine_is_recorded(prepared_digits: Path):
    for path in [prepared_digits / "index.json", *(prepared_digits / "receipts").iterdir()]:
        assert str(prepared_digits.parent) not in json.dumps(json.loads(path.read_bytes()))
