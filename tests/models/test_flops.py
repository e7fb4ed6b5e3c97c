"""Counted FLOPs equal the formula; the formula gives the published table."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.models import MODELS
from fasttrain.models.flops import TRAINING
from tests.models.conditions import conditions

SHAPE = {"input_size": 32, "channels": 4, "num_classes": 1000}
CLIP = {"text_tokens": 77, "text_width": 768, "text_pooled": 768}
CONTROLLED = {"input_size": 8, "channels": 1, "num_classes": 10, "num_timesteps": 1000, "controls": {"size": "low", "crop": "high"}}


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "vit-tiny", "input_size": 8, "channels": 1, "num_classes": 10},
        {"name": "vit-s/4", "input_size": 64, "channels": 3},
        {"name": "dit-tiny", "input_size": 8, "channels": 1, "num_classes": 10},
        {"name": "dit-s/4", **SHAPE, "learn_sigma": True},
        {"name": "vit-tiny", "input_size": 8, "channels": 1, "num_classes": 10, "qk_norm": True, "rotary": True},
        {"name": "dit-tiny", **CONTROLLED, "conditioning": "attention"},
        {"name": "mmdit-tiny", **CONTROLLED},
        {"name": "mmdit-tiny", **CONTROLLED, **CLIP, "pooled": True, "masked_text": True},
        {"name": "mmdit-dual-tiny", **CONTROLLED},
        {"name": "mmdit-dual-tiny", **CONTROLLED, **CLIP},
    ],
    ids=lambda spec: "-".join([spec["name"], *(key for key in ("conditioning", "text_tokens") if key in spec)]),
)
def test_formula_equals_torchs_counter(spec):
    config = MODELS.build(spec)
    batch = 2
    cond = conditions(config, batch, device="meta")
    with torch.device("meta"):
        model = config.build()
        x = torch.zeros(batch, config.channels, config.input_size, config.input_size)
        t = torch.zeros(batch, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, cond)
    assert counter.get_total_flops() == batch * config.flops_per_image()


@pytest.mark.parametrize(
    ("preset", "geometry", "training_gflops"),
    [
        ("vit-b/2", SHAPE, 138.8),
        ("vit-l/4", {"input_size": 64, "channels": 3, "num_classes": 1000}, 426.2),
        ("vit-xl/2", SHAPE, 716.0),
        ("dit-xl/2", SHAPE, 711.7),
        ("dit-xl/2", {**SHAPE, "conditioning": "attention"}, 714.6),
        ("mmdit-xl/2", SHAPE, 714.6),
        ("mmdit-xl/2", {**SHAPE, **CLIP}, 935.3),
    ],
)
def test_published_table(preset, geometry, training_gflops):
    config = MODELS.build({"name": preset, **geometry})
    # The table leaves out both ends of the network, at most 0.1 % of it.
    assert TRAINING * config.flops_per_image() / 1e9 == pytest.approx(training_gflops, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "changes", "gflops"),
    [("dit-xl/2", {}, 237.4), ("dit-xl/2", {"conditioning": "attention"}, 237.93), ("mmdit-xl/2", {}, 237.93)],
)
def test_the_conditioning_papers_table_at_256_pixels(preset, changes, gflops):
    """Berrada et al. 2024, table A1, class-conditional, within 1 %."""
    config = MODELS.build({"name": preset, **SHAPE, **changes})
    assert config.flops_per_image() / 1e9 == pytest.approx(gflops, rel=0.01)
