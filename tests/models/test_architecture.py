"""A model's config refuses what cannot be built, by name; every preset's miniature trains."""

import dataclasses

import pytest
import torch

from fasttrain.cond import Cond
from fasttrain.errors import UserError
from fasttrain.models import MODELS
from fasttrain.models.memory import count_parameters

KNOWN = {"input_size": 8, "channels": 3, "num_classes": 10}


@pytest.mark.parametrize("name", ["vit", "dit", "mmdit"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 100, "heads": 3}, "model.width 100 is not divisible by model.heads 3"),
        ({"input_size": 9}, "model.input_size 9 is not divisible by model.patch 2"),
        ({"depth": 0}, "model.depth must be at least 1, not 0"),
        ({"patch": 0}, "model.patch must be at least 1"),
        ({"num_classes": -1}, r"model.num_classes must be 0 \(unconditional\)"),
        ({"rotary": True, "qk_norm": False}, "model.rotary turns normalised queries and keys: set model.qk_norm too"),
        ({"rotary": True, "qk_norm": True, "width": 24, "heads": 4}, r"divisible by 4, not model.width / model.heads = 6"),
        ({"widht": 8}, "did you mean 'width'"),
    ],
)
def test_impossible_configs_name_the_key(name, change, told):
    with pytest.raises(ValueError, match=told):
        MODELS.build({"name": name, **change})


def test_family_specific_keys():
    with pytest.raises(ValueError, match=r"model.width 6 is not divisible by 4"):
        MODELS.build({"name": "dit", "width": 6, "heads": 1})
    with pytest.raises(ValueError, match=r"model.position_base must be at least 1"):
        MODELS.build({"name": "dit", "position_base": 0})
    with pytest.raises(ValueError, match=r"model.num_timesteps must be at least 1"):
        MODELS.build({"name": "vit", "num_timesteps": 0})
    with pytest.raises(ValueError, match="norm"):
        MODELS.build({"name": "dit", "norm": "batch"})


def test_replacing_a_field_is_checked_too():
    config = MODELS.build("vit-tiny")
    with pytest.raises(ValueError, match=r"model.input_size 7"):
        dataclasses.replace(config, input_size=7)


@pytest.mark.parametrize("name", ["vit-tiny", "dit-tiny", "mmdit-tiny"])
def test_what_the_data_must_say_is_asked_for(name):
    config = MODELS.build({"name": name, "channels": 3})
    for use in (config.build, config.flops_per_image, lambda: config.null_label):
        with pytest.raises(UserError, match=r"model.input_size, model.num_classes: not set"):
            use()


@pytest.mark.parametrize("name", MODELS.names())
def test_every_preset_in_miniature_trains(name):
    """The preset's own patch, norm and conditioning at a hundredth of its size."""
    preset = MODELS.build(name)
    classes = 10 if preset.num_classes is None else preset.num_classes
    torch.manual_seed(0)
    small = dataclasses.replace(preset, input_size=4 * preset.patch, channels=3, num_classes=classes, depth=2, width=32, heads=2)
    model = small.build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(4, 3, small.input_size, small.input_size)
    t, cond = torch.tensor([0, 10, 500, 999]), Cond(torch.tensor([0, 1, 2, classes]))
    losses = []
    for _ in range(8):
        out = model(x, t, cond)
        assert out.shape == x.shape
        loss = (out - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    "spec",
    [{"name": "vit", "num_timesteps": 1000}, {"name": "dit"}, {"name": "dit", "conditioning": "attention"}, {"name": "mmdit"}],
    ids=str,
)
def test_rotation_alone_tells_attention_where_a_patch_is(spec, rotary):
    """Without positions added to them, patches in another order give the same predictions in that order, unless they are turned."""
    torch.manual_seed(0)
    model = MODELS.build({**spec, **KNOWN, "depth": 2, "width": 32, "heads": 2, "patch": 4, "qk_norm": True, "rotary": rotary}).build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if name != "pos_embed" else parameter.zero_()
        for name, buffer in model.named_buffers():
            buffer.mul_(name != "positions")
    x, t, cond = torch.randn(1, 3, 8, 8), torch.tensor([3]), Cond(torch.tensor([4]))
    swapped = torch.cat([x[..., 4:, :], x[..., :4, :]], dim=2)  # the two rows of patches
    out, other = model(x, t, cond), model(swapped, t, cond)
    same = torch.allclose(torch.cat([other[..., 4:, :], other[..., :4, :]], dim=2), out, rtol=1e-4, atol=1e-4)
    # Rotation is relative: two rows swapped are one row up instead of one row down.
    assert same is not rotary


@pytest.mark.parametrize("name", ["vit-tiny", "dit-tiny"])
def test_qk_norm_adds_two_weights_a_block_and_rotation_none(name):
    plain, normed, turned = (
        count_parameters(MODELS.build({"name": name, **KNOWN, **extra}))
        for extra in ({}, {"qk_norm": True}, {"qk_norm": True, "rotary": True})
    )
    assert normed == turned and normed.trained - plain.trained == normed.total - plain.total == 4 * 2 * 32
