"""From stored samples to what a step begins with: ranges, flips and posteriors, as functions of seed and position alone."""

import numpy as np
import pytest
import torch
from fasttrain_kernels.philox import Purpose, normal
from fasttrain_kernels.uniform import uniform

from fasttrain.data.index import Index
from fasttrain.data.transform import ImageTransform, LatentTransform, build_transform

SEED = torch.tensor(5)


def _posteriors(batch: int) -> torch.Tensor:
    stored = torch.randn(batch, 2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    return stored.to(torch.float16)


def test_pixels_span_minus_one_to_one():
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x0 = ImageTransform(SEED)(stored, torch.zeros(1, dtype=torch.int64))
    assert x0.dtype == torch.float32 and x0.min() == -1 and x0.max() == 1
    np.testing.assert_allclose(x0.flatten(), np.arange(256) / 127.5 - 1, atol=1e-6)


def test_images_are_mirrored_where_the_position_says_so():
    stored = torch.randint(0, 256, (64, 3, 4, 5), dtype=torch.uint8)
    position = torch.arange(1000, 1064)
    plain, mirrored = (ImageTransform(SEED, flip)(stored, position) for flip in (False, True))
    expected = uniform(SEED, position, Purpose.FLIP) < 0.5
    assert 15 < expected.sum() < 49
    for b in range(64):
        torch.testing.assert_close(mirrored[b], plain[b].flip(-1) if expected[b] else plain[b], rtol=0, atol=0)


def test_latents_follow_the_formula():
    stored, position = _posteriors(8), torch.arange(40, 48)
    shift, scale = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0, 0.18])
    x0 = LatentTransform(shift, scale, flip=True)(stored, position).sample(SEED, position)
    eps = normal(SEED, position, (4, 6, 6), Purpose.POSTERIOR)
    for b in range(8):
        mean, logvar = stored[b, int(uniform(SEED, position[b : b + 1], Purpose.FLIP) < 0.5)].float()
        expected = ((mean + (logvar / 2).exp() * eps[b]) - shift[:, None, None]) * scale[:, None, None]
        torch.testing.assert_close(x0[b], expected, rtol=1e-6, atol=1e-6)


def test_a_posterior_is_drawn_anew_at_each_visit_and_alike_at_the_same_one():
    stored, transform = _posteriors(2)[:1], LatentTransform(torch.zeros(4), torch.ones(4))
    here, again, there = (transform(stored, torch.tensor([n])).sample(SEED, torch.tensor([n])) for n in (3, 3, 4))
    assert torch.equal(here, again) and not torch.equal(here, there)


def test_a_batch_is_its_samples():
    stored, position = _posteriors(8), torch.arange(8) * 2**31
    transform = LatentTransform(torch.zeros(4), torch.ones(4), flip=True)
    alone = [transform(stored[b : b + 1], position[b : b + 1]).sample(SEED, position[b : b + 1]) for b in range(8)]
    assert torch.equal(transform(stored, position).sample(SEED, position), torch.cat(alone))


def test_to_latents_undoes_the_scaling():
    transform = LatentTransform(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0]))
    z = torch.randn(3, 2, 4, 4)
    x0 = (z - transform.shift[:, None, None]) * transform.scale[:, None, None]
    torch.testing.assert_close(transform.to_latents(x0), z)


def _latent_index() -> Index:
    return Index.model_validate(
        {
            "format": 3,
            "pixels": 32,
            "kind": "latent",
            "samples": 1,
            "rejected": 0,
            "shape": [2, 2, 2, 4, 4],
            "dtype": "float16",
            "classes": ["a"],
            "num_classes": 1,
            "source": {"name": "s", "xxh3": "0" * 32},
            "labels_xxh3": "0" * 32,
            "digests_xxh3": "0" * 32,
            "vae": {"id": "v", "scaling_factor": 0.18215},
            "latent_shift": [1.0, 2.0],
            "latent_scale": [3.0, 4.0],
            "shards": [{"file": "a.tar", "samples": 1, "bytes": 10240, "xxh3": "0" * 32, "offset": 1664, "stride": 2560}],
        }
    )


@pytest.mark.parametrize(("normalise", "shift", "scale"), [("channel", [1, 2], [3, 4]), ("vae", [0, 0], [0.18215, 0.18215])])
def test_the_index_gives_the_scale(normalise: str, shift: list[float], scale: list[float]):
    transform = build_transform(_latent_index(), SEED, normalise=normalise)
    assert isinstance(transform, LatentTransform)
    torch.testing.assert_close(transform.shift, torch.tensor(shift, dtype=torch.float32))
    torch.testing.assert_close(transform.scale, torch.tensor(scale, dtype=torch.float32))
