"""diffusers' classes beside ours: how the config of one becomes that of the other, and what either cannot say.

DiTTransformer2DModel computes what our DiT computes where `frequency_shift` is 1 and `norm_eps` is its own: its sinusoid divides by 127
where DiT divides by 128, and no key of its config changes that. Its blocks each keep the time and class embedders, which DiT has once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fasttrain.interchange.names import DIFFUSERS_DIT, DIFFUSERS_SD3, Layout
from fasttrain.models.embeddings import grid_coordinates, sincos_positions


@dataclass(frozen=True)
class Form:
    """One of diffusers' classes, and ours that it is.

    Attributes:
        layout: its names.
        fixed: keys of its config that must have these values, because nothing here computes others.
        defaults: what its other keys are where a config leaves them out.
        ours: its config -> fields of ours.
        theirs: our fields -> its config.
        inexpressible: our fields -> what of them it cannot compute, in words.
        computed: our parameters that it computes itself and does not keep.
        advice: our fields -> what to know of it, or to do with it, before it computes the same: a line each.
        added: our fields -> what it keeps that is no parameter of ours, under our names.
    """

    layout: Layout
    fixed: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any]
    ours: Callable[[Mapping[str, Any]], dict[str, Any]]
    theirs: Callable[[Mapping[str, Any]], dict[str, Any]]
    inexpressible: Callable[[Mapping[str, Any]], list[str]]
    computed: tuple[str, ...] = ()
    advice: Callable[[Mapping[str, Any]], list[str]] = lambda model: []
    added: Callable[[Mapping[str, Any]], dict[str, Tensor]] = lambda model: {}


def _our_dit(config: Mapping[str, Any]) -> dict[str, Any]:
    channels = config["in_channels"]
    return {
        "name": "dit",
        "input_size": config["sample_size"],
        "channels": channels,
        "num_classes": config["num_embeds_ada_norm"],
        "patch": config["patch_size"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "learn_sigma": config["out_channels"] == 2 * channels,
        "norm_eps": config["norm_eps"],
        **DIFFUSERS_DIT.always,
    }


def _their_dit(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": model["heads"],
        "attention_head_dim": model["width"] // model["heads"],
        "in_channels": model["channels"],
        "out_channels": model["channels"] * (2 if model["learn_sigma"] else 1),
        "num_layers": model["depth"],
        "attention_bias": True,
        "sample_size": model["input_size"],
        "patch_size": model["patch"],
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": model["num_classes"],
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": model["norm_eps"],
    }


def _beyond_dit(model: Mapping[str, Any]) -> list[str]:
    found = {
        "model.num_classes 0 (it always takes a class)": not model["num_classes"],
        "model.norm rms": model["norm"] != "layer",
        "model.qk_norm": model["qk_norm"],
        "model.rotary": model["rotary"],
        "model.conditioning attention": model["conditioning"] != "adaln",
        "model.controls": model["controls"],
        "model.position_base": model["position_base"] not in (None, model["input_size"] // model["patch"]),
    }
    return [words for words, there in found.items() if there]


def _advice_on_dit(model: Mapping[str, Any]) -> list[str]:
    """Its sinusoid cannot be chosen in its config, only on the object."""
    if model["frequency_shift"] == 1:
        return []
    return [
        "# its timestep frequencies differ from this model's (model.frequency_shift 0) until, after loading, you run:",
        "for block in model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0",
    ]


DIT_FORM = Form(
    layout=DIFFUSERS_DIT,
    fixed={
        "attention_bias": (True,),
        "activation_fn": ("gelu-approximate",),
        "norm_type": ("ada_norm_zero",),
        "norm_elementwise_affine": (False,),
        "dropout": (0, 0.0),
    },
    defaults={
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": None,
        "num_layers": 28,
        "dropout": 0.0,
        "attention_bias": True,
        "sample_size": 32,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
    },
    ours=_our_dit,
    theirs=_their_dit,
    inexpressible=_beyond_dit,
    computed=("pos_embed",),
    advice=_advice_on_dit,
)


def _our_sd3(config: Mapping[str, Any]) -> dict[str, Any]:
    grid, table = config["sample_size"] // config["patch_size"], config["pos_embed_max_size"]
    return {
        "name": "mmdit",
        "input_size": config["sample_size"],
        "channels": config["in_channels"],
        "patch": config["patch_size"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "qk_norm": config["qk_norm"] == "rms_norm",
        "text_width": config["joint_attention_dim"],
        "text_pooled": config["pooled_projection_dim"],
        "position_table": None if table == grid else table,
        **DIFFUSERS_SD3.always,
    }


def _their_sd3(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sample_size": model["input_size"],
        "patch_size": model["patch"],
        "in_channels": model["channels"],
        "out_channels": model["channels"],
        "num_layers": model["depth"],
        "attention_head_dim": model["width"] // model["heads"],
        "num_attention_heads": model["heads"],
        "joint_attention_dim": model["text_width"],
        "caption_projection_dim": model["width"],
        "pooled_projection_dim": model["text_pooled"],
        "pos_embed_max_size": model["position_table"] or model["input_size"] // model["patch"],
        "dual_attention_layers": [],
        "qk_norm": "rms_norm" if model["qk_norm"] else None,
    }


def _beyond_sd3(model: Mapping[str, Any]) -> list[str]:
    found = {
        "model.form shared": model["form"] != "dual",
        "a model of classes (it takes text alone)": model["text_width"] is None,
        "model.pooled false": model["pooled"] is False,
        "model.masked_text": model["masked_text"],
        "model.norm rms": model["norm"] != "layer",
        "model.rotary": model["rotary"],
        "model.controls": model["controls"],
    }
    return [words for words, there in found.items() if there]


def _sd3_positions(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole table, of which the class takes the middle: it keeps the table's values, so any coordinates are its."""
    grid, table, base = model["input_size"] // model["patch"], model["position_table"], model.get("position_base")
    line = grid_coordinates(grid, base) if table is None else grid_coordinates(table, base or grid, table)
    return {"positions": sincos_positions(model["width"], line)[None]}


SD3_FORM = Form(
    layout=DIFFUSERS_SD3,
    fixed={"dual_attention_layers": ([], ()), "qk_norm": (None, "rms_norm")},
    defaults={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 18,
        "attention_head_dim": 64,
        "num_attention_heads": 18,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1152,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 96,
        "dual_attention_layers": (),
        "qk_norm": None,
    },
    ours=_our_sd3,
    theirs=_their_sd3,
    inexpressible=_beyond_sd3,
    added=_sd3_positions,
)

FORMS = {"DiTTransformer2DModel": DIT_FORM, "SD3Transformer2DModel": SD3_FORM, "Transformer2DModel": DIT_FORM}
"""By the name that a folder's config.json gives; the last is the DiT's of older folders, facebook/DiT-XL-2-256 among them."""
