"""The randomness in plain torch: published vectors, and the statistics of what is made from them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fasttrain_kernels.philox import Purpose, normal, philox
from torch import Tensor

from benchmarks import noise
from benchmarks.noise import Figure

SEED = 0x1234_5678_9ABC_DEF0


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


def outside(figures: list[Figure]) -> list[Figure]:
    return [figure for figure in figures if not figure.within]


def test_ten_million_normals_are_normal() -> None:
    figures = noise.normality(noise.drawn(noise.DRAWS))
    assert len(figures) == 7 and not outside(figures)


def test_numbers_do_not_know_each_other() -> None:
    figures = noise.independence(noise.PAIRS) + noise.uniformity(noise.PAIRS)
    assert not outside(figures)
    for word in ("elements", "positions", "purposes", "seeds"):
        assert sum(word in figure.name for figure in figures) >= 8


PLANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z + 0.005,
    "variance": lambda z: z * 1.004,
    "skewness": lambda z: z + 0.005 * (z**2 - 1),
    "kurtosis": lambda z: torch.where(z.abs() < 4.5, z, 0.0) + 0.002 * (z**3 - 3 * z),
    "numbers beyond 4": lambda z: z.clamp(-4, 4),
    "distribution of normals": lambda z: torch.where(z.abs() < 0.01, 0.0, z),
}


@pytest.mark.parametrize("name", PLANTED)
def test_numbers_that_are_not_normal_are_noticed(name: str) -> None:
    z = noise.drawn(1_000_000, seed=1)
    assert not outside(noise.normality(z))
    assert name in [figure.name for figure in outside(noise.normality(PLANTED[name](z)))]


@pytest.mark.parametrize(
    ("kept", "noticed"),
    [
        (lambda seed, position, shape, purpose: (seed & 0xFFFFFFFF, position, purpose), "seeds that differ in bit 32"),
        (lambda seed, position, shape, purpose: (seed, position & 0xFFFFFFFF, purpose), "positions 4294967296 apart"),
        (lambda seed, position, shape, purpose: (seed, position // 2, purpose), "positions 1 apart"),
        (lambda seed, position, shape, purpose: (seed, position, Purpose(purpose % 4)), "purposes noise and posterior"),
    ],
)
def test_a_word_that_is_not_used_is_noticed(kept: Any, noticed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(seed: int, position: Tensor, shape: tuple[int, ...], purpose: Purpose) -> Tensor:
        seed, position, purpose = kept(seed, position, shape, purpose)
        return normal(seed, position, shape, purpose)

    monkeypatch.setattr(noise, "normal", careless)
    assert noticed in " ".join(figure.name for figure in outside(noise.independence(100_000)))


def test_position_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"position must be \[B\], got \(2, 3\)"):
        normal(SEED, torch.zeros(2, 3, dtype=torch.int64), (4,))
