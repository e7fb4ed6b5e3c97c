"""A score from images, on scikit-learn's real digits, and its protocol."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fasttrain.errors import UserError
from fasttrain.evaluation.evaluate import evaluate
from fasttrain.evaluation.features import FEATURES, Images, Pixels
from fasttrain.evaluation.protocol import Protocol

PROTOCOL = Protocol(
    reference="digits",
    reference_digest="xxh3:0123",
    checkpoint_step=300,
    weights="ema 5000 images",
    sampler={"name": "heun", "steps": 18},
    guidance=1.5,
    seed=7,
)


@pytest.fixture(scope="module")
def digits() -> Images:
    return (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]


def batches(images: Images, size: int = 200) -> Iterator[Images]:
    return (images[i : i + size] for i in range(0, len(images), size))


def distance(samples: Images, reference: Images) -> float:
    return evaluate(batches(samples), batches(reference), Pixels(), PROTOCOL).frechet_distance


def test_pixels_are_flattened_and_scaled() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    features = FEATURES.build("pixels")(images)
    assert features.dtype == np.float64 and np.array_equal(features, np.arange(24).reshape(2, 12) / 255)


def test_real_digits_are_nearer_to_digits_than_noise_or_one_class_is(digits: Images) -> None:
    half, other = digits[::2], digits[1::2]
    noise = np.random.default_rng(0).integers(0, 256, half.shape, dtype=np.uint8)
    threes = digits[load_digits().target == 3]
    assert distance(digits, digits) < 1e-10
    assert 10 * distance(half, other) < distance(threes, other) < distance(noise, other)


def test_score_names_what_it_compared_and_is_saved_whole(digits: Images, tmp_path: Path) -> None:
    score = evaluate(batches(digits[:500], 33), batches(digits), Pixels(), PROTOCOL)
    score.save(tmp_path / "score.json")
    stored = json.loads((tmp_path / "score.json").read_text())
    assert stored["frechet_distance"] == score.frechet_distance
    assert (stored["samples"], stored["reference_samples"], stored["features"]) == (500, 1797, {"name": "pixels"})
    assert stored["protocol"]["sampler"] == {"name": "heun", "steps": 18} and stored["protocol"]["versions"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["score.json"]


def test_the_batches_do_not_matter(digits: Images) -> None:
    scores = [
        evaluate(batches(digits[:900], size), batches(digits[900:], 2 * size), Pixels(), PROTOCOL).frechet_distance
        for size in (10, 111, 900)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-12)


def test_other_shapes_are_refused(digits: Images) -> None:
    with pytest.raises(UserError, match=r"samples are images \(4, 16, 1\), the reference holds \(8, 8, 1\)"):
        distance(digits.reshape(-1, 4, 16, 1), digits)
    with pytest.raises(UserError, match="samples: images of shape"):
        evaluate([digits[:5], digits[:5].reshape(5, 4, 16, 1)], batches(digits), Pixels(), PROTOCOL)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(digits: Images, count: int) -> None:
    with pytest.raises(UserError, match=r"reference: .*at least 2"):
        distance(digits, digits[:count])
