"""Every published size has exactly the parameters its architecture says, and the figure its paper prints."""

import dataclasses

import pytest

from fasttrain.models import MODELS
from fasttrain.models.memory import count_parameters

LATENTS = {"input_size": 32, "channels": 4, "num_classes": 1000}
PIXELS = {"input_size": 64, "channels": 3}
SIGMA = {**LATENTS, "learn_sigma": True}
CLIP = {"text_tokens": 77, "text_width": 768, "text_pooled": 768}

# preset, geometry, depth, width, millions
VIT = [
    ("vit-s/4", PIXELS, 13, 512, 43.20),
    ("vit-b/2", LATENTS, 12, 768, 89.11),
    ("vit-l/4", {**PIXELS, "num_classes": 1000}, 21, 1024, 269.98),
    ("vit-xl/2", LATENTS, 28, 1152, 452.39),
]
DIT = [
    ("dit-s/2", SIGMA, 12, 384, 32.96),
    ("dit-b/2", SIGMA, 12, 768, 130.51),
    ("dit-l/2", SIGMA, 24, 1024, 458.10),
    ("dit-xl/2", SIGMA, 28, 1152, 675.13),
]


def vit_parameters(depth: int, width: int, patch: int, channels: int, size: int, num_classes: int, num_timesteps: int = 4000) -> int:
    block = (
        2 * 2 * width  # two affine norms
        + 3 * width * width + 2 * width  # qkv, with biases for q and v
        + width * width + width  # projection
        + 2 * 4 * width * width + 4 * width + width  # MLP
    )  # fmt: skip
    values = patch * patch * channels
    tables = (num_timesteps + (num_classes + 1 if num_classes else 0)) * width
    positions = ((size // patch) ** 2 + 1 + bool(num_classes)) * width
    return depth * block + (values + 1) * width + (width + 1) * values + tables + positions


def dit_parameters(depth: int, width: int, patch: int, channels: int, size: int, num_classes: int, out_channels: int) -> int:
    matrices = 3 + 1 + 8 + 6  # qkv, projection, MLP, modulation
    biases = 3 + 1 + 5 + 6
    block = matrices * width**2 + biases * width
    values_in, values_out = patch * patch * channels, patch * patch * out_channels
    time = (256 + 1) * width + (width + 1) * width
    final = 2 * width * (width + 1) + (width + 1) * values_out
    return depth * block + (values_in + 1) * width + time + (num_classes + 1) * width + (size // patch) ** 2 * width + final


@pytest.mark.parametrize(("preset", "geometry", "depth", "width", "millions"), VIT)
def test_vit_counts(preset, geometry, depth, width, millions):
    config = MODELS.build({"name": preset, **geometry})
    expected = vit_parameters(depth, width, config.patch, config.channels, config.input_size, config.num_classes)
    assert count_parameters(config) == (expected, expected)
    assert round(expected / 1e6, 2) == millions


@pytest.mark.parametrize(("preset", "geometry", "depth", "width", "millions"), DIT)
def test_dit_counts(preset, geometry, depth, width, millions):
    config = MODELS.build({"name": preset, **geometry})
    expected = dit_parameters(depth, width, 2, 4, 32, 1000, out_channels=8)
    assert count_parameters(config) == (expected, expected - 16 * 16 * width)  # the positions are not trained
    assert round(expected / 1e6, 2) == millions


def test_a_class_in_attention_has_dits_parameters_and_the_papers_count():
    config = MODELS.build({"name": "dit-xl/2", **LATENTS, "conditioning": "attention"})
    count = count_parameters(config)
    assert count == count_parameters(MODELS.build({"name": "dit-xl/2", **LATENTS}))
    assert count.total / 1e6 == pytest.approx(679.09, rel=0.01)


def mmdit_parameters(
    depth: int, width: int, patch: int, channels: int, heads: int, *, dual: bool, tokens_in: int, pooled: int, classes: int
) -> int:
    full = 18 * width**2 + 15 * width  # qkv, projection, MLP, modulation, with their biases
    last_text = 5 * width**2 + 5 * width  # qkv and two vectors of modulation
    inner = 2 * depth * full - full + last_text if dual else depth * (full + 3 * width**2 + 3 * width)
    norms = 4 * depth * (width // heads)
    values = patch * patch * channels
    time = (256 + 1) * width + (width + 1) * width
    text = (tokens_in + 1) * width if tokens_in else (classes + 1) * width
    text += (pooled + 1) * width + (width + 1) * width if pooled else 0
    return inner + norms + (values + 1) * width + time + text + 2 * width * (width + 1) + (width + 1) * values


@pytest.mark.parametrize(
    ("size", "depth", "width", "heads"), [("s", 12, 384, 6), ("b", 12, 768, 12), ("l", 24, 1024, 16), ("xl", 28, 1152, 16)]
)
@pytest.mark.parametrize(("stem", "dual"), [("mmdit", False), ("mmdit-dual", True)])
def test_mmdit_counts(stem, dual, size, depth, width, heads):
    shape = {"depth": depth, "width": width, "patch": 2, "channels": 4, "heads": heads, "dual": dual, "classes": 1000}
    classes = MODELS.build({"name": f"{stem}-{size}/2", **LATENTS})
    assert count_parameters(classes).total == mmdit_parameters(**shape, tokens_in=0, pooled=0)
    text = MODELS.build({"name": f"{stem}-{size}/2", **LATENTS, **CLIP})
    counts = count_parameters(text)
    assert counts.total == counts.trained == mmdit_parameters(**shape, tokens_in=768, pooled=768 if dual else 0)


@pytest.mark.parametrize("heads", [16, 18])
def test_mmdits_published_counts(heads):
    """The shared form is the paper's 791.64 M with CLIP-L's text, within 1 %; SD3's two streams at that size are 1,328.9 M."""
    shared, dual = (MODELS.build({"name": name, **LATENTS, **CLIP, "heads": heads}) for name in ("mmdit-xl/2", "mmdit-dual-xl/2"))
    assert count_parameters(shared).total / 1e6 == pytest.approx(791.64, rel=0.01)
    assert round(count_parameters(dual).total / 1e6, 1) == 1328.9
    controls = {"size": "low", "crop": "high", "flip": "high"}
    told = MODELS.build({**MODELS.spec(shared), "controls": controls, "num_timesteps": 1000})
    assert count_parameters(told).total / 1e6 == pytest.approx(791.64, rel=0.01)


@pytest.mark.parametrize("patch", [4, 8])
@pytest.mark.parametrize(("size", "depth", "width"), [("s", 12, 384), ("b", 12, 768), ("l", 24, 1024), ("xl", 28, 1152)])
def test_dit_counts_of_larger_patches(size, depth, width, patch):
    config = MODELS.build({"name": f"dit-{size}/{patch}", **LATENTS})
    assert count_parameters(config).total == dit_parameters(depth, width, patch, 4, 32, 1000, out_channels=4)


@pytest.mark.parametrize("preset", ["vit-tiny", "dit-tiny", "mmdit-tiny", "mmdit-dual-tiny"])
def test_tiny_fits_a_cpu(preset):
    config = MODELS.build({"name": preset, "input_size": 8, "channels": 1, "num_classes": 10})
    assert 5e5 < count_parameters(config).trained < 5e6
    assert config.grid**2 == 16


def test_the_papers_printed_counts_leave_the_class_table_out():
    """43, 88, 269 and 451 M in the paper's table 1."""
    printed = []
    for preset, geometry, _, width, _ in VIT:
        config = MODELS.build({"name": preset, **geometry})
        table = (config.num_classes + 1) * width if config.num_classes else 0
        printed.append(round((count_parameters(config).total - table) / 1e6))
    assert printed == [43, 88, 269, 451]


def test_every_preset_builds_without_allocating_and_round_trips():
    for name in MODELS.names():
        config = dataclasses.replace(MODELS.build(name), input_size=64, channels=4, num_classes=10)
        assert count_parameters(config).total > 0
        assert MODELS.build(MODELS.spec(config)) == config
