"""References: shards, statistics of others, and what is kept of them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError
from fasttrain.evaluation import kept as kept_module
from fasttrain.evaluation import protocol
from fasttrain.evaluation import reference as module
from fasttrain.evaluation.collected import Collector, Statistics, statistics
from fasttrain.evaluation.features import Images, Pixels
from fasttrain.evaluation.frechet import Gaussian
from fasttrain.evaluation.kept import KeptStatistics, _identity
from fasttrain.evaluation.precision_recall import radii
from fasttrain.evaluation.reference import Reference, Shards, StatisticsFile
from fasttrain.versions import installed

CPU = torch.device("cpu")


def images(count: int = 20) -> Images:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)


def of(reference: Reference, ranks: int = 1) -> Statistics:
    collectors = [Collector("reference", Pixels()) for _ in range(ranks)]
    for rank, collector in enumerate(collectors):
        for part in reference.parts(rank, ranks):
            collector.update(*part)
    return statistics("reference", [collector.share() for collector in collectors])


def write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("ranks", [1, 3])
def test_shards_are_read_whole_by_any_number_of_processes(digits: Path, monkeypatch: pytest.MonkeyPatch, ranks: int):
    monkeypatch.setattr(module, "BATCH_BYTES", 64 * 100)
    reference = Shards(ShardSet.open(digits))
    assert (reference.shape, reference.name, reference.gaussian()) == ((8, 8, 1), "shards", None)
    found, arrays = of(reference, ranks), ShardSet.open(digits).gather(np.arange(1797)).arrays
    assert found.gaussian.vectors == 1797 and found.rows is not None and found.rows.shape == (1797, 64)
    assert torch.allclose(found.gaussian.cov, torch.from_numpy(np.cov(arrays.reshape(1797, -1).T / 255.0)), rtol=0, atol=1e-12)


def test_images_beside_statistics_are_read_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 48 * 6)
    given = images()
    reference = StatisticsFile(write(tmp_path / "adm.npz", arr_0=given, mu=np.arange(5.0), sigma=np.eye(5)))
    assert (reference.kind, reference.shape) == ("statistics", (4, 4, 3))
    stated = reference.gaussian()
    assert stated is not None and stated.vectors is None and stated.mean.tolist() == [0, 1, 2, 3, 4]
    parts = [list(reference.parts(rank, 2)) for rank in (0, 1)]
    assert [[len(part.images) for part in share] for share in parts] == [[6, 6], [6, 2]]
    assert np.array_equal(np.concatenate([parts[0][0].images, parts[1][0].images, parts[0][1].images, parts[1][1].images]), given)


def test_statistics_alone_have_no_images(tmp_path: Path):
    reference = StatisticsFile(write(tmp_path / "s.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32)))
    assert reference.shape is None and not list(reference.parts(0, 1))


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"mu": np.zeros(3)}, "not an npz of mu and sigma .*sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \[3\] and sigma \[4, 4\] do not fit"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "must be finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "sigma must be symmetric"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 1e-5], [0.0, 1.0]]) * 1e-9}, "sigma must be symmetric"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu \[0\] and sigma \[0, 0\] do not fit"),
        ({"mu": np.zeros(2, complex), "sigma": np.eye(2)}, "mu must be real numbers, is complex128"),
        ({"mu": np.zeros(2), "sigma": np.eye(2, dtype=bool)}, "sigma must be real numbers, is bool"),
        ({"mu": np.array(["1.0"]), "sigma": np.eye(1)}, "mu must be real numbers"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, -1e-3])}, "sigma is no covariance: its eigenvalues, .*begin at -0.001"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "sigma is no covariance"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "arr_0": np.zeros((2, 4, 4, 3))}, "arr_0 must be uint8 images"),
        ({"mu": np.array([Path()], object), "sigma": np.eye(1)}, "not an npz of mu and sigma .*pickle"),
        ({"mu": np.array(["x"]), "sigma": np.eye(1)}, "not an npz of mu and sigma"),
    ],
)
def test_another_npz_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], told: str):
    with pytest.raises(UserError, match=told):
        StatisticsFile(write(tmp_path / "s.npz", **arrays))


def test_covariances_that_were_rounded_or_are_of_no_rank_are_taken(tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(5, 30))
    for sigma in (
        np.cov(rows.T).astype(np.float32),
        np.cov(rows.T).astype(np.float32) * 1e-12,
        np.zeros((30, 30)),
        np.eye(30, dtype=np.int64),
    ):
        StatisticsFile(write(tmp_path / "s.npz", mu=np.zeros(30, np.float32), sigma=sigma))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whatever_is_damaged_in_a_file_is_one_mistake(tmp_path: Path, save: Any):
    save(tmp_path / "sound.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=images(3))
    sound = (tmp_path / "sound.npz").read_bytes()
    refused = 0
    changes = [sound[:i] + bytes([sound[i] ^ 1 << bit]) + sound[i + 1 :] for i, bit in enumerate([0, 6] * (len(sound) // 2))]
    for damaged in [*changes, *(sound[:i] for i in range(0, len(sound), 20))]:
        (tmp_path / "s.npz").write_bytes(damaged)
        try:
            list(StatisticsFile(tmp_path / "s.npz").parts(0, 1))
        except UserError as error:
            refused += "not an npz of mu and sigma" in str(error)
    assert refused > len(sound) / 2


def test_images_may_be_written_to_by_features(tmp_path: Path):
    reference = StatisticsFile(write(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=images()))
    assert all(part.images.flags.writeable for part in reference.parts(0, 1))


@pytest.mark.parametrize("content", [None, b"", b"PK but no archive"])
def test_no_npz_is_refused(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(UserError, match="not an npz of mu and sigma"):
        StatisticsFile(tmp_path / "s.npz")


class Halved(Pixels):
    """Other features of the same images."""

    @property
    def told(self):
        return {"name": "halved"}


def test_statistics_are_found_again_for_the_same_images_and_features_alone(digits: Path, tmp_path: Path):
    reference, kept = Shards(ShardSet.open(digits)), KeptStatistics(tmp_path / "cache")
    computed = of(reference)
    assert kept.find(reference, Pixels(), CPU) is None
    kept.keep(reference, Pixels(), CPU, computed)
    found = kept.find(Shards(ShardSet.open(digits)), Pixels(), CPU)
    assert found is not None and found.rows is not None and computed.rows is not None
    assert torch.equal(found.gaussian.cov, computed.gaussian.cov) and torch.equal(found.rows, computed.rows)
    assert torch.equal(found.gaussian.mean, computed.gaussian.mean) and found.gaussian.vectors == 1797
    assert kept.find(reference, Halved(), CPU) is None and kept.find(reference, Pixels(), torch.device("cuda")) is None
    assert computed.radii is None and found.radii is None
    kept.keep(reference, Pixels(), CPU, replace(computed, radii=radii(computed.rows)))
    found = kept.find(reference, Pixels(), CPU)
    assert found is not None and found.radii is not None and torch.equal(found.radii, radii(computed.rows))
    other = StatisticsFile(write(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=images()))
    assert kept.find(other, Pixels(), CPU) is None
    assert len(list((tmp_path / "cache").iterdir())) == 1


class Numbered(Pixels):
    """As many features as are wanted."""

    def __init__(self, number: int):
        self.number = number

    @property
    def told(self):
        return {"name": f"numbered {self.number}"}


def test_those_that_were_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept_module, "MOST_FILES", 3)
    reference = StatisticsFile(write(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=images()))
    kept = KeptStatistics(tmp_path / "cache")
    found = Statistics(Gaussian(torch.zeros(3).double(), torch.eye(3).double(), 20), torch.ones(20, 3))

    def here() -> list[int]:
        return [number for number in range(5) if kept._place(_identity(reference, Numbered(number), CPU)).exists()]

    for number in range(3):
        kept.keep(reference, Numbered(number), CPU, found)
        os.utime(kept._place(_identity(reference, Numbered(number), CPU)), (number, number))
    assert here() == [0, 1, 2] and kept.find(reference, Numbered(0), CPU) is not None
    kept.keep(reference, Numbered(3), CPU, found)
    assert here() == [0, 2, 3], "0 was used after 1 and 2"
    os.utime(kept._place(_identity(reference, Numbered(0), CPU)), (2**33, 2**33))  # by a clock that was ahead
    os.utime(kept._place(_identity(reference, Numbered(3), CPU)), (2**33, 2**33))
    kept.keep(reference, Numbered(4), CPU, found)
    assert here() == [0, 3, 4], "what was kept just now is not the one that goes"


class Changed(Pixels):
    """The same features by another formula."""

    @property
    def told(self):
        return {**super().told, "version": 2}


def test_statistics_do_not_outlive_the_code_that_made_them(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reference, kept = Shards(ShardSet.open(digits)), KeptStatistics(tmp_path / "cache")
    kept.keep(reference, Pixels(), CPU, of(reference))
    assert kept.find(reference, Pixels(), CPU) is not None and kept.find(reference, Changed(), CPU) is None
    for package in ("fasttrain", "torch", "numpy", "pillow"):
        with monkeypatch.context() as patch:
            patch.setattr(protocol, "installed", lambda name, changed=package: "9.9" if name == changed else installed(name))
            assert kept.find(reference, Pixels(), CPU) is None, package
    assert kept.find(reference, Pixels(), CPU) is not None


def test_damaged_statistics_are_not_believed(tmp_path: Path):
    reference = StatisticsFile(write(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=images()))
    kept = KeptStatistics(tmp_path / "cache")
    kept.keep(reference, Pixels(), CPU, Statistics(Gaussian(torch.zeros(3).double(), torch.eye(3).double(), 20), torch.ones(20, 3)))
    (file,) = (tmp_path / "cache").iterdir()
    sound = file.read_bytes()
    for damaged in (sound[:-9], sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:], b"", b"{}"):
        file.write_bytes(damaged)
        assert kept.find(reference, Pixels(), CPU) is None
    file.write_bytes(sound)
    assert kept.find(reference, Pixels(), CPU) is not None
