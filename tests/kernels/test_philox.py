"""The randomness in plain torch: published vectors, and the statistics of what is made from them."""

import math

import pytest
import torch
from fasttrain_kernels.philox import Purpose, normal, philox
from scipy import stats

SEED = 0x1234_5678_9ABC_DEF0
SIX_SIGMA = 6.0


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter: tuple[int, ...], key: tuple[int, ...], expected: str) -> None:
    words = philox(key[0] | key[1] << 32, counter[0], counter[1], counter[2] | counter[3] << 32)
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_arguments_broadcast_and_values_are_32_bit() -> None:
    words = philox(torch.tensor(-5), torch.arange(3), Purpose.FLIP, torch.tensor([[2**40], [-1]]))
    for word in words:
        assert word.shape == (2, 3) and word.dtype == torch.int64
        assert word.min() >= 0 and word.max() < 2**32
    alone = philox(torch.tensor(-5), 2, Purpose.FLIP, -1)
    assert [word[1, 2].item() for word in words] == [word.item() for word in alone]


def test_a_sample_depends_on_its_position_and_not_on_its_batch() -> None:
    position = torch.tensor([5, 2**33 + 1, 7])
    together = normal(SEED, position, (3, 5))
    for row, place in zip(together, position, strict=True):
        assert torch.equal(normal(SEED, place[None], (3, 5))[0], row)
    assert torch.equal(normal(SEED, position, (7,)), together.flatten(1)[:, :7])


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (5,), ()])
def test_any_sample_shape(shape: tuple[int, ...]) -> None:
    assert normal(SEED, torch.arange(2), shape).shape == (2, *shape)
    assert normal(SEED, torch.arange(0), shape).shape == (0, *shape)


def test_high_words_of_seed_and_position_count() -> None:
    base = normal(SEED, torch.tensor([3]), (8,))
    assert not torch.equal(base, normal(SEED ^ 1 << 40, torch.tensor([3]), (8,)))
    assert not torch.equal(base, normal(SEED, torch.tensor([3 + 2**32]), (8,)))


def test_seed_as_tensor_and_as_int_agree() -> None:
    assert torch.equal(normal(-3, torch.arange(2), (4,)), normal(torch.tensor(-3), torch.arange(2), (4,)))
    assert torch.equal(normal(2**64 - 3, torch.arange(2), (4,)), normal(-3, torch.arange(2), (4,)))


def test_normals_are_normal() -> None:
    z = normal(SEED, torch.arange(1024), (1024,)).double().flatten()
    n = z.numel()
    assert abs(z.mean()) < SIX_SIGMA / math.sqrt(n)
    assert abs(z.var() - 1) < SIX_SIGMA * math.sqrt(2 / n)
    assert abs((z**3).mean()) < SIX_SIGMA * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < SIX_SIGMA * math.sqrt(96 / n)
    assert stats.kstest(z[:200_000].numpy(), "norm").pvalue > 1e-3
    expected_beyond_four = n * 2 * stats.norm.sf(4)
    assert abs((z.abs() > 4).sum() - expected_beyond_four) < SIX_SIGMA * math.sqrt(expected_beyond_four)


def test_normals_do_not_know_each_other() -> None:
    position = torch.arange(2048)
    draws = [normal(SEED, position, (128,), purpose).double() for purpose in (Purpose.NOISE, Purpose.SAMPLE)]
    draws.append(normal(SEED + 1, position, (128,)).double())
    a = draws[0]
    pairs = [(a, draws[1]), (a, draws[2]), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[:, 2:], a[:, :-2]), (a[:, 4:], a[:, :-4])]
    for left, right in pairs:
        limit = SIX_SIGMA / math.sqrt(left.numel())
        assert abs((left * right).mean()) < limit
        assert abs(((left**2 - 1) * (right**2 - 1)).mean()) < 2 * limit


def test_position_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"position must be \[B\], got \(2, 3\)"):
        normal(SEED, torch.zeros(2, 3, dtype=torch.int64), (4,))
