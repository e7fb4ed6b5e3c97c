"""Damaged prepared shards: what still verifies is used, the rest replaced by a function of the position, counted and named."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.data import arrays
from fasttrain.data.config import DataConfig
from fasttrain.data.files import LocalFiles
from fasttrain.data.loader import held_out_loader, positions_of, training_loader
from fasttrain.data.order import HeldOut, Order
from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError

SEED = torch.tensor(11)
FIRST, STRIDE = 1664, 2048  # where the digits' arrays lie
SHARD = 599


def _open(folder: Path, most: float = 1, **settings: object) -> ShardSet:
    return ShardSet.open(folder, DataConfig(train=str(folder), max_damaged=most, **settings))


def _flip(path: Path, *places: int) -> None:
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 1
    path.write_bytes(content)


def _assert_lost(shards: ShardSet, sound: Path, lost: set[int]) -> None:
    """Exactly these are unreadable; all others are as they were, each with its own label."""
    ids = np.arange(len(shards))
    found, wanted = shards.gather(ids), ShardSet.open(sound).gather(ids)
    assert set(np.flatnonzero(~found.readable).tolist()) == lost
    np.testing.assert_array_equal(found.arrays[found.readable], wanted.arrays[found.readable])
    np.testing.assert_array_equal(found.labels, wanted.labels)


@pytest.mark.parametrize("kept", [0, 1, 512, FIRST + 63, FIRST + 64, FIRST + 65, 100_000, 1_000_000, SHARD * STRIDE])
def test_a_shard_cut_short_loses_what_is_behind_the_cut(digits: Path, prepared_digits: Path, kept: int):
    os.truncate(digits / "shard-00002.tar", kept)
    whole = sum(FIRST + row * STRIDE + 64 <= kept for row in range(SHARD))
    shards = _open(digits)
    (told,) = shards.damage.news()
    size = (prepared_digits / "shard-00002.tar").stat().st_size
    lost = SHARD - whole
    if lost:
        assert told.told() == f"shard-00002.tar: {lost} of 599 samples unreadable (cut short: {kept} of {size} bytes); replaced"
    _assert_lost(shards, prepared_digits, set(range(2 * SHARD + whole, 3 * SHARD)))
    assert shards.damage.news() == [] and shards.damage.unreadable == lost


def test_flipped_bits_lose_the_samples_that_they_are_in(digits: Path, prepared_digits: Path):
    _flip(digits / "shard-00001.tar", 0, 5000, FIRST + 7 * STRIDE + 3, FIRST + 9 * STRIDE, FIRST + 9 * STRIDE + 63)
    shards = _open(digits)
    assert shards.damage.news() == [], "sizes agree: it is not read before it is needed"
    _assert_lost(shards, prepared_digits, {SHARD + 7, SHARD + 9})
    (told,) = shards.damage.news()
    assert told.told() == "shard-00001.tar: 2 of 599 samples unreadable (its content is not what was prepared); replaced"
    assert _open(digits, verify=False).gather(np.array([SHARD + 7])).readable.all()


def test_what_is_wrong_beside_the_samples_is_told_and_costs_none(digits: Path, prepared_digits: Path):
    with (digits / "shard-00000.tar").open("ab") as file:
        file.write(b"garbage")
    _flip(digits / "shard-00001.tar", FIRST + 3 * STRIDE + 200)  # padding
    shards = _open(digits, most=0)
    _assert_lost(shards, prepared_digits, set())
    told = [each.told() for each in shards.damage.news()]
    assert told[0].startswith("shard-00000.tar: longer than it was") and all("all 599 samples verify" in line for line in told)
    assert len(told) == 2


def test_shards_that_are_gone_or_no_tars(digits: Path, prepared_digits: Path):
    (digits / "shard-00000.tar").unlink()
    (digits / "shard-00001.tar").write_bytes(np.random.default_rng(0).bytes((digits / "shard-00001.tar").stat().st_size))
    shards = _open(digits)
    _assert_lost(shards, prepared_digits, set(range(2 * SHARD)))
    assert [each.why for each in shards.damage.news()] == ["missing", "its content is not what was prepared"]


def test_more_damage_than_allowed_ends_the_run(digits: Path):
    _flip(digits / "shard-00001.tar", *(FIRST + row * STRIDE for row in range(18)))
    shards = _open(digits, most=0.01)
    with pytest.raises(
        UserError, match=r"18 of 1797 samples are unreadable, more than data\.max_damaged 0\.01 .*shard-00001\.tar: 18 of 599"
    ):
        shards.gather(np.array([SHARD]))
    _flip(digits / "shard-00001.tar", FIRST)
    assert _open(digits, most=0.01).gather(np.array([SHARD])).readable.all()


def _seen(folder: Path, world: int, threads: int, start: int = 0, steps: int = 40) -> dict[int, tuple[int, int, bytes]]:
    config = DataConfig(train=str(folder), max_damaged=1, threads=threads, held_out=97)
    seen: dict[int, tuple[int, int, bytes]] = {}
    for rank in range(world):
        with training_loader(config, ShardSet.open(folder, config), SEED) as loader:
            for batch in itertools.islice(loader.batches(start, 48 // world, rank, world), steps):
                for position, sample, label, x0 in zip(batch.position, batch.sample_id, batch.cond.labels, batch.x0(SEED), strict=True):
                    seen[int(position)] = (int(sample), int(label), x0.numpy().tobytes())
    return seen


def test_substitutes_are_a_function_of_the_position(digits: Path, prepared_digits: Path):
    os.truncate(digits / "shard-00000.tar", 300 * STRIDE)
    _flip(digits / "shard-00001.tar", FIRST, FIRST + 70 * STRIDE)
    whole = _seen(digits, 1, 0)
    assert _seen(digits, 1, 3) == whole and _seen(digits, 2, 1) == whole and _seen(digits, 4, 0) == whole
    assert _seen(digits, 2, 1, 20 * 48, 20).items() <= whole.items()
    sound, stored = _seen(prepared_digits, 1, 0), ShardSet.open(prepared_digits)
    lost = {*range(300, SHARD), SHARD, SHARD + 70}
    order = Order(1700, stored.index.shard_samples, 11)
    for position, (sample, label, x0) in whole.items():
        planned = sound[position][0]
        assert (sample == planned) == (planned not in lost) and sample not in lost and sample < 1700
        found = stored.gather(np.array([sample]))
        assert label == found.labels[0] and x0 == (torch.from_numpy(found.arrays[0]).float() / 127.5 - 1).numpy().tobytes()
        if planned in lost:
            tries = (int(order.substitutes(np.array([position]), k)[0]) for k in itertools.count())
            assert sample == next(n for n in tries if n not in lost)


def test_replaced_positions_are_counted_as_they_are_given(digits: Path):
    os.truncate(digits / "shard-00000.tar", 300 * STRIDE)
    config = DataConfig(train=str(digits), max_damaged=1, held_out=97)
    shards = ShardSet.open(digits, config)
    with training_loader(config, shards, SEED) as loader:
        counted = 0
        for number, batch in enumerate(itertools.islice(loader.batches(0, 50), 34)):
            planned = loader.order.sample_ids(positions_of(0, number, 50, 0, 1))
            counted += int((planned != batch.sample_id.numpy()).sum())
            assert loader.replaced == counted
    assert counted == 299


def test_held_out_samples_are_replaced_among_themselves(digits: Path):
    _flip(digits / "shard-00002.tar", *(FIRST + row * STRIDE for row in range(SHARD - 97, SHARD - 50)))
    config = DataConfig(train=str(digits), max_damaged=1, held_out=97)
    with held_out_loader(config, ShardSet.open(digits, config), SEED) as loader:
        ids = torch.cat([batch.sample_id for batch in itertools.islice(loader.batches(0, 97), 3)])
    assert ids.min() == 1747 and ids.max() == 1796 and loader.replaced == 3 * 47


def test_nothing_readable_is_an_error_and_no_hang(digits: Path):
    for path in digits.glob("*.tar"):
        path.unlink()
    config = DataConfig(train=str(digits), max_damaged=1)
    with training_loader(config, ShardSet.open(digits, config), SEED) as loader, pytest.raises(UserError, match="1000 substitutes"):
        next(loader.batches(0, 4))


def test_a_passing_failure_is_tried_again_and_never_replaced(digits: Path, monkeypatch: pytest.MonkeyPatch):
    calls: Iterator[int] = itertools.count()
    real = arrays.mapped_digest

    def failing(path: Path) -> str:
        if next(calls) < 3:
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(arrays, "mapped_digest", failing)
    shards = _open(digits, retry_seconds=20.0)
    assert shards.gather(np.array([3])).readable.all() and shards.damage.news() == []
    calls, shards = itertools.repeat(0), _open(digits, retry_seconds=0.3)
    with pytest.raises(UserError, match=r"shard-00001\.tar: Input/output error; tried"):
        shards.gather(np.array([700]))


def test_a_set_that_is_gone_as_a_whole_is_no_damage(digits: Path):
    shards = _open(digits, retry_seconds=0.3)
    digits.rename(digits.with_name("elsewhere"))
    with pytest.raises(UserError, match="the whole set is gone"):
        shards.gather(np.array([3]))
    assert shards.damage.unreadable == 0


def test_held_files_are_released_before_more_are_opened(digits: Path):
    class Bounded(LocalFiles):
        most_held = 2_600_000  # two shards

        def path(self, name: str) -> Path:
            held.append(name)
            assert len(held) <= 2
            return super().path(name)

        def release(self, name: str) -> None:
            held.remove(name)

    held: list[str] = []
    sound = ShardSet.open(digits)
    files = Bounded(digits)
    reader = arrays.ArrayReader(files, sound.index, np.load(digits / "digests.npy"), True, 0, sound.damage)
    shards = ShardSet(files, sound.index, sound.labels, reader, sound.damage, lambda: np.empty((len(sound), 0)))
    for ids in np.random.default_rng(0).integers(0, 1797, (20, 50)):
        np.testing.assert_array_equal(shards.gather(ids).arrays, sound.gather(ids).arrays)


def test_golden_substitutes():
    """They are part of the order: changing them would break resuming on damaged data."""
    drawn = Order(1700, (600, 599, 598), seed=7).substitutes(np.array([0, 1, 2, 10**9]), 0)
    assert drawn.tolist() == [1046, 254, 1101, 1497]
    assert HeldOut(1797, 97, 7).substitutes(np.array([5]), 3).tolist() == [1767]
