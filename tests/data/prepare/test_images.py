"""Preparing images: the same bytes whatever the processes, interruptions and containers; bad files named; bad commands refused."""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from fasttrain.data.prepare import images
from fasttrain.data.prepare.images import prepare_images
from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError

from ..conftest import contents

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data" / "imagenet_200.tar"


@pytest.fixture(scope="session")
def prepared_tree(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images") / "set"
    prepare_images(image_tree, out, size=32, shard_size=10)
    return out


def test_shards_are_equal_to_within_one_and_complete(prepared_tree: Path):
    shards = ShardSet.open(prepared_tree)
    assert shards.index.classes == ("cat", "dog", "owl") and shards.index.shape == (3, 32, 32)
    assert len(shards) == 203 and len(shards.index.shards) == 21
    assert shards.index.rejected == 2 and set(shards.index.shard_samples) <= {8, 9, 10}
    assert np.bincount(shards.labels).tolist() == [68, 68, 67]


def test_two_processes_write_the_bytes_of_one(image_tree: Path, prepared_tree: Path, tmp_path: Path):
    prepare_images(image_tree, tmp_path / "set", size=32, shard_size=10, workers=2)
    assert contents(tmp_path / "set") == contents(prepared_tree)


def test_a_tar_gives_the_shards_of_its_tree(image_tree: Path, prepared_tree: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "photos", "w:") as tar:
        tar.add(image_tree, arcname="photos")
    prepare_images(tmp_path / "photos", tmp_path / "set", size=32, shard_size=10)
    assert contents(tmp_path / "set") == contents(prepared_tree)


def test_stock_webdataset_reads_the_same(prepared_tree: Path):
    shards = ShardSet.open(prepared_tree)
    urls = [str(prepared_tree / shard.file) for shard in shards.index.shards]
    arrays, labels, _ = shards.gather(np.arange(203))
    for sample, array, label in zip(webdataset.WebDataset(urls, shardshuffle=False).decode(), arrays, labels, strict=True):
        np.testing.assert_array_equal(sample["npy"], array)
        assert sample["cls"] == label


COMMAND = """
import sys
from pathlib import Path
from fasttrain.data.prepare.images import prepare_images
if __name__ == "__main__":
    prepare_images(Path(sys.argv[1]), Path(sys.argv[2]), size=32, shard_size=10, workers=2)
"""


def test_killed_in_the_middle_it_leaves_nothing_half_written_and_goes_on(image_tree: Path, prepared_tree: Path, tmp_path: Path):
    script, out = tmp_path / "prepare.py", tmp_path / "set"
    script.write_text(COMMAND)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen([sys.executable, str(script), str(image_tree), str(out)], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.tar"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, "workers outlive the killed command"
    finished = {p.name: p.read_bytes() for p in out.glob("shard-*.tar")}
    assert 3 <= len(finished) < 21 and not (out / "index.json").exists()
    assert all(content == (prepared_tree / name).read_bytes() for name, content in finished.items())
    with pytest.raises(UserError, match=r"index\.json: missing, so this is no finished set"):
        ShardSet.open(out)
    (out / f"shard-00020.tar.1{'.tmp'}").write_bytes(b"half")  # what a kill during a write leaves
    assert prepare_images(image_tree, out, size=32, shard_size=10).made < 205
    assert contents(out) == contents(prepared_tree)


@pytest.fixture
def odd_tree(small_tree: Callable[[int], Path]) -> Path:
    """Four good images, six odd ones that are readable, and three that are not."""
    root = small_tree(2)
    photo = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 30, 3), np.uint8))
    photo.convert("CMYK").save(root / "a" / "cmyk.jpg")
    photo.convert("L").save(root / "a" / "grey.jpg")
    photo.quantize(8).save(root / "b" / "palette.gif")
    photo.convert("RGBA").save(root / "b" / "rgba.png")
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70).save(root / "b" / "wide.png")
    photo.resize((1, 1)).save(root / "b" / "one.png")
    photo.save(root / "a" / "cut.jpg")
    (root / "a" / "cut.jpg").write_bytes((root / "a" / "cut.jpg").read_bytes()[:500])
    (root / "b" / "notes.txt").write_text("not an image")
    (root / "b" / "void.jpg").touch()
    return root


def test_unreadable_images_are_skipped_counted_and_named(odd_tree: Path, tmp_path: Path):
    out = tmp_path / "set"
    prepared = prepare_images(odd_tree, out, size=16, shard_size=3)
    assert (prepared.index.samples, prepared.index.rejected, prepared.made) == (10, 3, 13)
    assert "3 unreadable, listed in rejected.jsonl" in prepared.summary(out)
    rejected = {line["file"]: line["reason"] for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert rejected["b/notes.txt"] == "not an image in a known format" and rejected["b/void.jpg"] == "an empty file"
    assert "truncated" in rejected["a/cut.jpg"].lower() and len(rejected) == 3
    arrays, labels, _ = ShardSet.open(out).gather(np.arange(10))
    assert arrays.shape == (10, 3, 16, 16) and np.bincount(labels).tolist() == [4, 6]


def test_nothing_readable_at_all(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "x.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"not one of the 2 files is a readable image; their reasons are in rejected\.jsonl"):
        prepare_images(tmp_path / "tree", tmp_path / "out", size=16)
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(
    ("size", "shard_size", "told"), [(16, 10, "shape .* there, .* asked for"), (32, 20, "shard_size 10 there, 20 asked for")]
)
def test_another_set_in_the_folder(image_tree: Path, prepared_tree: Path, size: int, shard_size: int, told: str):
    before = contents(prepared_tree)
    with pytest.raises(UserError, match=rf"already holds a different set \({told}.*give another folder"):
        prepare_images(image_tree, prepared_tree, size=size, shard_size=shard_size)
    assert contents(prepared_tree) == before


def test_another_source_in_the_folder(small_tree: Callable[[int], Path], prepared_tree: Path):
    with pytest.raises(UserError, match=r"already holds a different set .*source"):
        prepare_images(small_tree(2), prepared_tree, size=32, shard_size=10)


def test_other_files_in_the_folder(small_tree: Callable[[int], Path], tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"home: holds other files \(thesis\.tex"):
        prepare_images(small_tree(2), tmp_path / "home", size=16)
    assert contents(tmp_path / "home") == {"thesis.tex": b""}


def test_a_file_in_the_way(small_tree: Callable[[int], Path], tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"out: a file is in the way"):
        prepare_images(small_tree(2), tmp_path / "out", size=16)


@pytest.mark.parametrize("source", ["nowhere", "empty"])
def test_a_source_that_holds_nothing_leaves_nothing(tmp_path: Path, source: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"{source}: no "):
        prepare_images(tmp_path / source, tmp_path / "out", size=16)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def little_space() -> Iterator[None]:
    """No file of this process may grow past 20 kB: the kernel's own refusal, as from a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_left(image_tree: Path, tmp_path: Path, little_space: None):
    with pytest.raises(UserError, match=r"shard-00000\.tar: no space left; free some and run the same command again"):
        prepare_images(image_tree, tmp_path / "out", size=32, shard_size=10)
    assert set(contents(tmp_path / "out")) == {"receipts/plan.json"}


def test_too_little_space_is_told_before_anything_is_written(small_tree: Callable[[int], Path], tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free
    size = int((free / 3) ** 0.5)
    with pytest.raises(UserError, match=r"still to make need .* MB and .* MB are free"):
        prepare_images(small_tree(2), tmp_path / "out", size=size)
    assert set(contents(tmp_path / "out")) == {"receipts/plan.json"}


@pytest.mark.parametrize(("size", "shard_size"), [(0, 10), (16, 0)])
def test_sizes_must_be_positive(small_tree: Callable[[int], Path], tmp_path: Path, size: int, shard_size: int):
    with pytest.raises(UserError, match="--size and --shard-size must be at least 1"):
        prepare_images(small_tree(1), tmp_path / "out", size, shard_size)


def test_the_command(image_tree: Path, prepared_tree: Path, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    images.add_arguments(parser)
    images.run(parser.parse_args([str(image_tree), str(prepared_tree), "--size", "32", "--shard-size", "10", "--workers", "1"]))
    assert "203 samples of 3x32x32, 3 classes, 21 shards (nothing left to do: all shards verified)" in capsys.readouterr().out


@pytest.mark.skipif(not REAL.is_file(), reason="the 200 ImageNet photographs lie beside the checkout only on the developers' machine")
def test_real_photographs(tmp_path: Path):
    index = prepare_images(REAL, tmp_path / "set", size=64).index
    assert (index.samples, index.rejected, index.num_classes) == (200, 0, 200)
    arrays, labels, _ = ShardSet.open(tmp_path / "set").gather(np.arange(200))
    assert sorted(labels.tolist()) == list(range(200)) and 90 < arrays.mean() < 140 and arrays.std() > 50
