"""Counted FLOPs equal the formula; the formula gives the published table."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.cond import Cond
from fasttrain.models import MODELS
from fasttrain.models.flops import TRAINING

SHAPE = {"input_size": 32, "channels": 4, "num_classes": 1000}


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "vit-tiny", "input_size": 8, "channels": 1, "num_classes": 10},
        {"name": "vit-s/4", "input_size": 64, "channels": 3},
        {"name": "dit-tiny", "input_size": 8, "channels": 1, "num_classes": 10},
        {"name": "dit-s/4", **SHAPE, "learn_sigma": True},
        {"name": "vit-tiny", "input_size": 8, "channels": 1, "num_classes": 10, "qk_norm": True, "rotary": True},
    ],
    ids=lambda spec: spec["name"],
)
def test_formula_equals_torchs_counter(spec):
    config = MODELS.build(spec)
    batch = 2
    with torch.device("meta"):
        model = config.build()
        x = torch.zeros(batch, config.channels, config.input_size, config.input_size)
        t = torch.zeros(batch, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, Cond(t))
    assert counter.get_total_flops() == batch * config.flops_per_image()


@pytest.mark.parametrize(
    ("preset", "geometry", "training_gflops"),
    [
        ("vit-b/2", SHAPE, 138.8),
        ("vit-l/4", {"input_size": 64, "channels": 3, "num_classes": 1000}, 426.2),
        ("vit-xl/2", SHAPE, 716.0),
        ("dit-xl/2", SHAPE, 711.7),
    ],
)
def test_published_table(preset, geometry, training_gflops):
    config = MODELS.build({"name": preset, **geometry})
    # The table leaves out both ends of the network, at most 0.1 % of it.
    assert TRAINING * config.flops_per_image() / 1e9 == pytest.approx(training_gflops, rel=1e-3)
