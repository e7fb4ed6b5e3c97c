"""The loader: one order whatever the threads and ranks, errors that surface, threads that end."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain_kernels.latent_noising import Posterior
from fasttrain_kernels.philox import Purpose, normal
from fasttrain_kernels.uniform import uniform

from fasttrain.data.config import DataConfig
from fasttrain.data.loader import Batch, Loader, held_out_loader, positions_of, training_loader
from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError
from tests.shards import write_random

SEED = torch.tensor(11)


def _loader(folder: Path, **settings: object) -> Loader:
    config = DataConfig(train=str(folder), **settings)
    return training_loader(config, ShardSet.open(folder, config), SEED)


def _trace(loader: Loader, batches: int, *where: int) -> list[Batch]:
    with loader:
        return list(itertools.islice(loader.batches(*where), batches))


def test_positions_are_those_of_the_interface():
    np.testing.assert_array_equal(positions_of(100, 3, 4, 1, 2), 100 + 3 * 4 * 2 + 1 + 2 * np.arange(4))


def test_a_batch_is_what_the_order_and_the_shards_say(prepared_digits: Path):
    loader = _loader(prepared_digits, flip=True)
    for number, batch in enumerate(_trace(loader, 5, 1790, 16, 1, 2)):
        positions = positions_of(1790, number, 16, 1, 2)
        ids = loader.order.sample_ids(positions)
        stored, labels, _ = loader.shards.gather(ids)
        assert batch.clean.dtype == torch.float32
        assert batch.cond.labels.dtype == batch.position.dtype == batch.sample_id.dtype == torch.int64
        np.testing.assert_array_equal(batch.sample_id, ids)
        np.testing.assert_array_equal(batch.position, positions)
        np.testing.assert_array_equal(batch.cond.labels, labels)
        assert torch.equal(batch.clean, loader.transform(torch.from_numpy(stored), torch.from_numpy(positions)))


def test_traces_do_not_know_the_number_of_threads(prepared_digits: Path):
    traces = [_trace(_loader(prepared_digits, threads=threads, flip=True), 200, 0, 16) for threads in (0, 1, 3)]
    for batches in zip(*traces, strict=True):
        for other in batches[1:]:
            assert torch.equal(batches[0].clean, other.clean) and torch.equal(batches[0].cond.labels, other.cond.labels)
            assert torch.equal(batches[0].position, other.position) and torch.equal(batches[0].sample_id, other.sample_id)


def _by_position(folder: Path, world: int, start: int, steps: int, global_batch: int) -> dict[int, tuple[int, bytes]]:
    seen = {}
    for rank in range(world):
        for batch in _trace(_loader(folder, flip=True), steps, start, global_batch // world, rank, world):
            for position, sample, x0 in zip(batch.position.tolist(), batch.sample_id.tolist(), batch.x0(SEED), strict=True):
                assert position not in seen
                seen[position] = (sample, x0.numpy().tobytes())
    return seen


def test_worlds_of_1_2_4_and_restarts_between_them_see_the_same(prepared_digits: Path):
    whole = _by_position(prepared_digits, 1, 0, 60, 32)
    assert sorted(whole) == list(range(60 * 32))
    for world in (2, 4):
        assert _by_position(prepared_digits, world, 0, 60, 32) == whole
    elastic = {}
    for world, start in [(2, 0), (1, 20), (4, 40)]:
        elastic |= _by_position(prepared_digits, world, start * 32, 20, 32)
    assert elastic == whole


def test_latents_are_drawn_under_the_runs_seed_at_their_positions(tmp_path: Path):
    folder = write_random(tmp_path / "latents", "latent", (2, 2, 4, 3, 3), classes=2)
    loader = _loader(folder, flip=True)
    (batch,) = _trace(loader, 1, 100, 8)
    stored, _, _ = loader.shards.gather(batch.sample_id.numpy())
    shift, scale = (torch.tensor(c).view(4, 1, 1) for c in (loader.shards.index.latent_shift, loader.shards.index.latent_scale))
    mirrored = uniform(SEED, batch.position, Purpose.FLIP) < 0.5
    assert 0 < mirrored.sum() < 8
    mean, logvar = torch.from_numpy(stored)[torch.arange(8), mirrored.long()].float().unbind(1)
    z = mean + (logvar / 2).exp() * normal(SEED, batch.position, (4, 3, 3), Purpose.POSTERIOR)
    torch.testing.assert_close(batch.x0(SEED), (z - shift) * scale)
    assert isinstance(batch.clean, Posterior) and torch.equal(batch.clean.stored, torch.from_numpy(stored))
    (held_out,) = _trace(held_out_loader(DataConfig(train=str(folder), held_out=2, flip=True), loader.shards, SEED), 1, 0, 2)
    assert isinstance(held_out.clean, Posterior) and not held_out.clean.flip


def test_held_out_samples_are_kept_apart(prepared_digits: Path):
    config = DataConfig(train=str(prepared_digits), held_out=97, flip=True)
    shards = ShardSet.open(prepared_digits)
    trained = torch.cat([b.sample_id for b in _trace(training_loader(config, shards, SEED), 17, 0, 100)])
    assert sorted(trained.tolist()) == list(range(1700))
    held_out = torch.cat([b.sample_id for b in _trace(held_out_loader(config, shards, SEED), 1, 0, 97)])
    assert held_out.tolist() == list(range(1700, 1797))


@pytest.mark.parametrize("held_out", [1797, 5000])
def test_something_must_be_left_to_train_on(prepared_digits: Path, held_out: int):
    with pytest.raises(UserError, match=rf"data\.held_out: {held_out} of the 1797 samples"):
        _loader(prepared_digits, held_out=held_out)


def test_no_held_out_samples_to_load(prepared_digits: Path):
    with pytest.raises(UserError, match=r"data\.held_out: 0"):
        held_out_loader(DataConfig(train=str(prepared_digits)), ShardSet.open(prepared_digits), SEED)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_damage_surfaces_in_the_consumer_with_the_shard_named(digits: Path, threads: int):
    (digits / "shard-00001.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"599 of 1797 samples are unreadable.*shard-00001\.tar: 599 of 599 \(cut short: 6 of"):
        _trace(_loader(digits, threads=threads), 10, 0, 16)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_end_with_the_loader(prepared_digits: Path, threads: int):
    before = threading.active_count()
    loader = _loader(prepared_digits, threads=threads)
    batches = loader.batches(0, 16)
    next(batches)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


def test_a_second_pass_may_begin_while_the_first_is_left_unfinished(prepared_digits: Path):
    with _loader(prepared_digits) as loader:
        first, second = loader.batches(0, 8), loader.batches(800, 8)
        assert next(first).position[0] == 0 and next(second).position[0] == 800 and next(first).position[0] == 8


@pytest.mark.parametrize("where", [(0, 0), (-1, 4), (0, 4, 2, 2), (0, 4, -1, 2)])
def test_impossible_batches_are_refused_at_once(prepared_digits: Path, where: tuple[int, ...]):
    with pytest.raises(ValueError, match="micro_batch"), _loader(prepared_digits) as loader:
        loader.batches(*where)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: pinned, asynchronous copies cannot be shown here")
def test_batches_on_the_gpu_equal_those_on_the_cpu(prepared_digits: Path):
    config, shards = DataConfig(train=str(prepared_digits), flip=True, threads=3), ShardSet.open(prepared_digits)
    on_gpu = _trace(training_loader(config, shards, SEED.cuda()), 100, 0, 16)
    for gpu, cpu in zip(on_gpu, _trace(training_loader(config, shards, SEED), 100, 0, 16), strict=True):
        assert gpu.clean.is_cuda and torch.equal(gpu.clean.cpu(), cpu.clean) and torch.equal(gpu.cond.labels.cpu(), cpu.cond.labels)
