"""The order: complete, pure, shuffled, local, and blind to ranks."""

import numpy as np
import pytest

from fasttrain.data.loader import positions_of
from fasttrain.data.order import HeldOut, Order, permutation

CASES = {
    "one shard": ((17,), 17, 64, 4),
    "few shards": ((600, 599, 598), 1797, 64, 4),
    "more shards than streams": ((30,) * 40, 1200, 8, 2),
    "uneven, one empty, held out": ((31, 0, 28, 30) * 5, 400, 4, 1),
    "fewer samples than streams": ((3,) * 70, 61, 16, 2),
    "many small windows": ((2,) * 100, 199, 3, 1),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def arguments(request: pytest.FixtureRequest) -> tuple:
    shards, samples, streams, window = request.param
    return samples, shards, 7, streams, window


@pytest.fixture
def order(arguments: tuple) -> Order:
    return Order(*arguments)


def test_every_sample_exactly_once_an_epoch(order: Order):
    for epoch in range(3):
        ids = order.sample_ids(np.arange(epoch * order.samples, (epoch + 1) * order.samples))
        np.testing.assert_array_equal(np.sort(ids), np.arange(order.samples))


def test_random_access_equals_sequential(order: Order, arguments: tuple):
    n = 3 * order.samples
    sequential = order.sample_ids(np.arange(n))
    visits = np.random.default_rng(0).permutation(n)
    fresh = Order(*arguments)
    np.testing.assert_array_equal(fresh.sample_ids(visits), sequential[visits])
    assert [int(fresh.sample_ids(np.array([i]))[0]) for i in visits[:50]] == sequential[visits[:50]].tolist()


def test_epochs_and_seeds_differ():
    first = Order(1797, (600, 599, 598), seed=7)
    epochs = [first.sample_ids(np.arange(e * 1797, (e + 1) * 1797)) for e in range(3)]
    other = Order(1797, (600, 599, 598), seed=8).sample_ids(np.arange(1797))
    for a, b in [(epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], other)]:
        assert (a == b).mean() < 0.01


@pytest.mark.parametrize(("shards", "streams"), [((600, 599, 598), 64), ((30,) * 40, 8)])
def test_neighbours_do_not_repeat_between_epochs(shards: tuple[int, ...], streams: int):
    """A true shuffle keeps about one of N neighbouring pairs from one epoch to the next."""
    order = Order(sum(shards), shards, 7, streams, 2)
    pairs = []
    for epoch in range(2):
        ids = order.sample_ids(np.arange(epoch * order.samples, (epoch + 1) * order.samples))
        pairs.append(set(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)))
    assert len(pairs[0] & pairs[1]) < 0.02 * order.samples


def test_small_sets_are_shuffled_whole():
    """Each tenth of an epoch of three shards holds samples of every tenth of the ids, as many as chance gives."""
    order = Order(1797, (600, 599, 598), seed=7)
    ids = order.sample_ids(np.arange(1797))
    counts, _, _ = np.histogram2d(np.arange(1797), ids, bins=10)
    chi_square = ((counts - 17.97) ** 2 / 17.97).sum()
    assert 40 < chi_square < 135  # 81 degrees of freedom: 81 +- 12.7


@pytest.mark.parametrize("streams", [8, 64])
def test_the_union_of_ranks_is_the_order_of_one(streams: int):
    order = Order(1150, (30,) * 40, 7, streams, 2)
    whole = order.sample_ids(np.arange(100, 100 + 960))
    for world, micro_batch, batches in [(1, 32, 30), (2, 16, 30), (4, 48, 5), (3, 20, 16)]:
        seen = np.full(960, -1)
        for rank in range(world):
            for batch in range(batches):
                positions = positions_of(100, batch, micro_batch, rank, world)
                seen[positions - 100] = order.sample_ids(positions)
        np.testing.assert_array_equal(seen, whole)


def test_a_rank_reads_few_shards_at_a_time():
    """64 shards, 8 streams, windows of 2 shards: a rank of 4 owns 2 streams, so no more than 2 x 3 shards are open at once."""
    order = Order(64 * 100, (100,) * 64, 7, streams=8, window_shards=2)
    read = []
    for rank in range(4):
        shards = order.sample_ids(np.arange(rank, order.samples, 4)) // 100
        for stretch in shards.reshape(-1, 100):
            assert len(set(stretch.tolist())) <= 2 * 3
        read += sorted(set(shards.tolist()))
    assert sorted(read) == list(range(64))  # each shard is read by one rank


def test_a_stream_is_shuffled_within_its_window():
    order = Order(64 * 100, (100,) * 64, 7, streams=8, window_shards=2)
    stream = order.sample_ids(np.arange(0, order.samples, 8))
    assert np.mean(np.diff(stream) == 1) < 0.03


def test_held_out_samples_are_never_trained_on():
    order, held_out = Order(1700, (600, 599, 598), 7), HeldOut(1797, 97)
    trained = order.sample_ids(np.arange(1700))
    assert trained.max() == 1699
    np.testing.assert_array_equal(held_out.sample_ids(np.arange(97)), np.arange(1700, 1797))
    np.testing.assert_array_equal(held_out.sample_ids(np.arange(97, 194)), np.arange(1700, 1797))


def test_permutations_are_keyed_by_everything():
    keys = [(7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1), (7, 1 << 20, 5)]
    drawn = {permutation(50, *key).tobytes() for key in keys}
    assert len(drawn) == len(keys)
    assert permutation(0, 7).shape == (0,)


def test_golden_order():
    """The order is part of the format of a run: changing it would break resuming."""
    positions = np.array([0, 1, 2, 1796, 1797, 10**9])
    whole, local = Order(1797, (600, 599, 598), seed=7), Order(6400, (100,) * 64, 7, streams=8, window_shards=2)
    assert whole.sample_ids(positions).tolist() == [1432, 973, 926, 482, 813, 905]
    assert local.sample_ids(positions).tolist() == [1273, 3895, 4610, 167, 4579, 4753]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((5, (2, 2), 0), "1 .. 4"), ((0, (2,), 0), "1 .. 2"), ((2, (2,), 0, 0), "streams"), ((2, (2,), 0, 1, 0), "window")],
)
def test_impossible_orders_are_refused(arguments: tuple, told: str):
    with pytest.raises(ValueError, match=told):
        Order(*arguments)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="positions start at 0; got -3"):
        Order(4, (2, 2), 0).sample_ids(np.array([1, -3]))


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (4, 3), (3, 1)])
def test_the_shards_said_to_come_next_are_those_that_are_read(world: int, rank: int):
    counts = tuple(int(n) for n in np.random.default_rng(0).integers(0, 40, 50))
    order = Order(sum(counts) - 7, counts, 5, streams=4, window_shards=2)
    first = np.cumsum([0, *counts])
    stretch = order.window * order.streams
    for epoch in range(2):
        for start in range(epoch * order.samples, (epoch + 1) * order.samples - 2 * stretch, stretch):
            positions = np.arange(start + (rank - start) % world, start + 2 * stretch, world)
            read = np.unique(np.searchsorted(first, order.sample_ids(positions), side="right") - 1)
            assert set(read.tolist()) <= set(order.shards_ahead(start, rank, world))
            assert order.stretch(start) != order.stretch(start + stretch)
