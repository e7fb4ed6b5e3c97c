"""A score from images, on scikit-learn's real digits, and its protocol."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fasttrain.engine import distributed
from fasttrain.errors import UserError
from fasttrain.evaluation.collected import Collector, Statistics, chosen, statistics
from fasttrain.evaluation.evaluate import nearness, score
from fasttrain.evaluation.features import FEATURES, Images, Pixels
from fasttrain.evaluation.protocol import Protocol, Score

PROTOCOL = Protocol(
    reference="digits",
    reference_digest="xxh3:0123",
    reference_kind="images",
    checkpoint_step=300,
    weights="ema 5000 images",
    sampler={"name": "heun", "steps": 18},
    guidance=1.5,
    seed=7,
    device="cpu",
)


@pytest.fixture(scope="module")
def digits() -> Images:
    return (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]


def batches(images: Images, size: int = 200) -> Iterator[Images]:
    return (images[i : i + size] for i in range(0, len(images), size))


def collected(what: str, images: Images, size: int = 200, ranks: int = 1) -> Statistics:
    """As so many processes collect it, each every so-manieth batch."""
    collectors = [Collector(what, Pixels()) for _ in range(ranks)]
    for number, batch in enumerate(batches(images, size)):
        collectors[number % ranks].update(batch, np.ones(len(batch), bool))
    return statistics(what, [collector.share() for collector in collectors])


def scored(samples: Statistics, reference: Statistics) -> Score:
    with distributed.joined(60) as processes:
        return score(samples, reference, Pixels(), PROTOCOL, nearness(samples, reference, processes))


def distance(samples: Images, reference: Images) -> float:
    return score(collected("samples", samples), collected("reference", reference), Pixels(), PROTOCOL, None).frechet_distance


def test_pixels_are_flattened_and_scaled() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    features = FEATURES.build("pixels").open(torch.device("cpu"))(images)
    assert features.dtype == np.float64 and np.array_equal(features, np.arange(24).reshape(2, 12) / 255)


def test_real_digits_are_nearer_to_digits_than_noise_or_one_class_is(digits: Images) -> None:
    half, other = digits[::2], digits[1::2]
    noise = np.random.default_rng(0).integers(0, 256, half.shape, dtype=np.uint8)
    threes = digits[load_digits().target == 3]
    assert distance(digits, digits) < 1e-10
    assert 10 * distance(half, other) < distance(threes, other) < distance(noise, other)


def test_one_class_is_precise_and_recalls_little(digits: Images) -> None:
    threes = digits[load_digits().target == 3]
    found = scored(collected("samples", threes), collected("reference", digits))
    assert found.precision == 1 and found.recall is not None and found.recall < 0.4
    assert found.neighbours == {"k": 3, "samples": len(threes), "reference": 1797}


def test_score_names_what_it_compared_and_is_saved_whole(digits: Images, tmp_path: Path) -> None:
    found = scored(collected("samples", digits[:500], 33), collected("reference", digits))
    found.save(tmp_path / "score.json")
    stored = json.loads((tmp_path / "score.json").read_text())
    assert stored["frechet_distance"] == found.frechet_distance and stored["precision"] == found.precision
    assert (stored["samples"], stored["reference_samples"], stored["features"]) == (500, 1797, {"name": "pixels", "version": 1})
    assert stored["protocol"]["sampler"] == {"name": "heun", "steps": 18} and stored["protocol"]["versions"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["score.json"]


@pytest.mark.parametrize(("size", "ranks"), [(10, 1), (111, 3), (900, 1), (300, 4)])
def test_neither_batches_nor_processes_matter(digits: Images, size: int, ranks: int) -> None:
    """Nor a process that had nothing to do."""
    reference = collected("reference", digits[900:])
    whole = scored(collected("samples", digits[:900], 900), reference)
    found = scored(collected("samples", digits[:900], size, ranks), reference)
    assert found.frechet_distance == pytest.approx(whole.frechet_distance, rel=1e-12)
    assert (found.precision, found.recall, found.samples) == (whole.precision, whole.recall, 900)


def test_features_of_other_lengths_are_refused(digits: Images) -> None:
    with pytest.raises(UserError, match="pixels features have 64 numbers, its statistics 32"):
        distance(digits, digits[:, :4])


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(digits: Images, count: int) -> None:
    with pytest.raises(UserError, match=r"reference: .*at least 2"):
        distance(digits, digits[:count])


def test_of_three_images_there_is_no_precision(digits: Images) -> None:
    found = scored(collected("samples", digits[:3]), collected("reference", digits))
    assert found.precision is found.recall is found.neighbours is None and found.frechet_distance > 0


def test_features_that_are_not_finite_are_refused(digits: Images) -> None:
    class Broken(Pixels):
        def __call__(self, images: Images) -> np.ndarray:
            return super().__call__(images) * np.inf

    with pytest.raises(UserError, match="samples: pixels features are not finite"):
        Collector("samples", Broken()).update(digits[1:3], np.ones(2, bool))


def test_the_vectors_that_are_kept_are_spread_over_the_set() -> None:
    assert chosen(10).all() and len(chosen(10)) == 10
    kept = chosen(1000, most=100)
    assert kept.sum() == 100 and np.array_equal(kept, chosen(1000, most=100))
    # Neither the first classes of a sorted set nor some of those that take turns.
    assert all(3 <= kept[i * 100 : (i + 1) * 100].sum() <= 20 and 3 <= kept[i::10].sum() <= 20 for i in range(10))
