"""The power cosine against values worked out by hand; controls that count where and when they should, and nowhere else."""

import math

import pytest
import torch
import torch.nn.functional as F

from fasttrain.cond import CONTROLS, Cond
from fasttrain.errors import UserError
from fasttrain.models import MODELS
from fasttrain.models.controls import control_flops, levels, power_cosine
from fasttrain.models.memory import count_parameters

TINY = {"input_size": 8, "channels": 3, "num_classes": 10, "depth": 2, "width": 32, "heads": 4, "num_timesteps": 1000}
BOTH = {"size": "low", "crop": "high", "flip": "high"}
FAMILIES = ["dit", "mmdit"]


def build(name: str = "dit", awake: bool = True, **changes):
    torch.manual_seed(0)
    model = MODELS.build({"name": name, **TINY, "controls": BOTH, **changes}).build()
    if awake:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
    return model


def batch(t: float = 300.0, size: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    controls = torch.tensor([[256.0, 300.0, 5.0, 0.0, 1.0]]).repeat(size, 1) + torch.arange(size)[:, None]
    return x, torch.full((size,), t), Cond(torch.arange(size), controls=controls)


@pytest.mark.parametrize(
    ("t", "power", "expected"),
    [
        (0, 8.0, 1.0),
        (1000, 8.0, 0.0),
        (100, 8.0, 0.3916447),  # 0.9^8 = 0.43046721; (1 - cos(pi 0.43046721)) / 2
        (500, 8.0, 3.764908e-05),  # 0.5^8 = 0.00390625; sin^2(0.006135923)
        (500, 1.0, 0.5),
        (250, 2.0, 0.5975452),  # 0.75^2 = 0.5625; (1 - cos(101.25 degrees)) / 2
    ],
)
def test_power_cosine_by_hand(t, power, expected):
    got = power_cosine(torch.tensor([t]), 1000, power)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected, rel=1e-5, abs=0)
    assert got.item() == pytest.approx((1 - math.cos(math.pi * (1 - t / 1000) ** power)) / 2, abs=1e-7)


def test_power_cosine_falls_from_one_to_zero():
    values = power_cosine(torch.arange(1001), 1000, 8.0)
    assert values[0] == 1 and values[-1] == 0 and (values.diff() <= 0).all()


def test_columns_follow_the_table_of_controls_whatever_the_configs_order():
    one = MODELS.build({"name": "dit", **TINY, "controls": {"flip": "high", "size": "low"}})
    other = MODELS.build({"name": "dit", **TINY, "controls": {"size": "low", "flip": "high"}})
    assert one == other and list(one.controls) == ["size", "flip"] and one.control_columns == ("height", "width", "flip")
    assert levels(one) == {"high": (2,), "low": (0, 1)}
    every = MODELS.build({"name": "dit", **TINY, "controls": dict.fromkeys(CONTROLS, "high")})
    assert every.control_columns == ("height", "width", "top", "left", "flip", "aspect")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_embedding_is_equation_1(name):
    model, (_, t, cond) = build(name), batch(t=100.0)
    got = model.control_embedder(cond, t, torch.float32)

    def mlp(level: str, columns: list[int]) -> torch.Tensor:
        waves = []
        for column in columns:
            angle = cond.controls[:, column].double()[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)]).double()
            waves += [angle.cos(), angle.sin()]
        first, _, last = (layer.double() if hasattr(layer, "weight") else layer for layer in model.control_embedder[level])
        return last(F.silu(first(torch.cat(waves, dim=1))))

    expected = mlp("high", [2, 3, 4]) + 0.3916447 * mlp("low", [0, 1])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_low_controls_cannot_change_the_output_where_gamma_is_zero(name):
    model = build(name, controls={"size": "low"})
    outs = {}
    for t in (1000.0, 0.0):
        x, times, cond = batch(t)
        cond = Cond(cond.labels, controls=cond.controls[:, :2])
        outs[t] = [model(x, times, Cond(cond.labels, controls=cond.controls * factor)) for factor in (1.0, 3.0)]
    assert torch.equal(*outs[1000.0]) and not torch.equal(*outs[0.0])
    constant = build(name, controls={"size": "low"}, control_power=None)
    x, times, cond = batch(1000.0)
    assert not torch.equal(*(constant(x, times, Cond(cond.labels, controls=cond.controls[:, :2] * factor)) for factor in (1.0, 3.0)))


@pytest.mark.parametrize("name", FAMILIES)
def test_where_controls_are_left_out_their_values_do_not_matter_at_all(name):
    model, (x, t, cond) = build(name), batch()
    where = torch.tensor([True, False, True])
    told = model(x, t, cond)
    partly = model(x, t, Cond(cond.labels, controls=cond.controls, controlled=where))
    garbage = cond.controls.masked_fill(~where[:, None], float("nan"))
    without = model(x, t, Cond(cond.labels))
    assert torch.equal(model(x, t, Cond(cond.labels, controls=garbage, controlled=where)), partly)
    assert torch.equal(partly[where], told[where]) and not torch.equal(told[1], without[1])
    torch.testing.assert_close(partly[1], without[1], rtol=0, atol=0)
    assert torch.equal(model(x, t, Cond(cond.labels, controls=cond.controls, controlled=torch.zeros(3, dtype=torch.bool))), without)


@pytest.mark.parametrize("name", FAMILIES)
def test_they_start_at_zero_and_learn(name):
    model, (x, t, cond) = build(name, awake=False), batch(t=50.0)
    assert not model.control_embedder(cond, t, torch.float32).any()
    model = build(name)
    model(x, t, cond).square().mean().backward()
    for parameter_name, parameter in model.control_embedder.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name


def test_parameters_and_flops_come_with_controls_alone():
    plain, told = (MODELS.build({"name": "dit", **TINY, "controls": controls}) for controls in ({}, BOTH))
    added = (3 * 256 + 1) * 32 + (2 * 256 + 1) * 32 + 2 * 33 * 32
    assert count_parameters(told).trained - count_parameters(plain).trained == added
    assert control_flops(plain) == 0 and told.flops_per_image() - plain.flops_per_image() == 2 * (5 * 256 * 32 + 2 * 32 * 32)
    x, t, cond = batch()
    plain = build(controls={})
    assert plain.control_embedder is None and torch.equal(plain(x, t, cond), plain(x, t, Cond(cond.labels)))


def test_what_is_wrong_is_told():
    x, t, cond = batch()
    with pytest.raises(ValueError, match=r"takes controls \[B, 5\] \(height, width, top, left, flip\), got \[3, 2\]"):
        build()(x, t, Cond(cond.labels, controls=cond.controls[:, :2]))
    with pytest.raises(ValueError, match="unknown control 'sise'; did you mean 'size'"):
        MODELS.build({"name": "dit", "controls": {"sise": "low"}})
    with pytest.raises(ValueError, match="controls"):
        MODELS.build({"name": "dit", "controls": {"size": "middle"}})
    with pytest.raises(ValueError, match="control_power must be above 0"):
        MODELS.build({"name": "dit", "control_power": 0})
    with pytest.raises(UserError, match="num_timesteps: not set and not yet taken"):
        build(num_timesteps=None)
    assert build(num_timesteps=None, control_power=None) and build(num_timesteps=None, controls={"flip": "high"})


def test_bf16_weights_take_controls():
    model, (x, t, cond) = build().bfloat16(), batch()
    out = model(x.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16 and not torch.equal(out, model(x.bfloat16(), t, Cond(cond.labels)))
