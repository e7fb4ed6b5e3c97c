"""Where other layouts of checkpoints keep our parameters, and what each kind says of its model by being of that kind: tables alone.

`{i}` is a block's number. Where ours is one tensor and theirs are several (packed queries, keys and values), theirs lie one after another
in ours. Where only theirs has a `{i}`, every block of theirs holds a copy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One of our parameters, and the names whose tensors, stacked along the first dimension, are it."""

    ours: str
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The names of one kind of checkpoint.

    Attributes:
        name: in words.
        model: the model of ours whose parameters these are.
        always: fields of that model's config, as every network of this kind has them.
    """

    name: str
    model: str
    entries: tuple[Entry, ...]
    always: Mapping[str, Any] = field(default_factory=dict)


def _both(ours: str, *theirs: str) -> Iterator[Entry]:
    """The weight and the bias of a layer."""
    for part in ("weight", "bias"):
        yield Entry(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs))


def _same(*names: str) -> Iterator[Entry]:
    """Parameters that bear our names."""
    for name in names:
        yield Entry(name, (name,))


_DIT: Mapping[str, Any] = {"conditioning": "adaln", "norm": "layer", "qk_norm": False, "rotary": False, "controls": {}}

DIT = Layout(
    "official DiT (facebookresearch/DiT)",
    "dit",
    (
        *_both("x_embedder.proj", "x_embedder.proj"),
        *_both("t_embedder.mlp.0", "t_embedder.mlp.0"),
        *_both("t_embedder.mlp.2", "t_embedder.mlp.2"),
        *_same("y_embedder.embedding_table.weight", "pos_embed"),
        *_both("blocks.{i}.attn.qkv", "blocks.{i}.attn.qkv"),
        *_both("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
        *_both("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *_both("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        *_both("blocks.{i}.adaLN_modulation.1", "blocks.{i}.adaLN_modulation.1"),
        *_both("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
        *_both("final_layer.linear", "final_layer.linear"),
    ),
    {**_DIT, "frequency_shift": 0, "norm_eps": 1e-6},
)

MIN_SNR_VIT = Layout(
    "Min-SNR's ViT (TiankaiHang/Min-SNR-Diffusion-Training)",
    "vit",
    (
        *_both("patch_embed.proj", "patch_embed.proj"),
        *_same("pos_embed", "time_embedding.weight", "class_embedding.weight"),
        *_both("blocks.{i}.norm1", "blocks.{i}.norm1"),
        *_same("blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.q_bias", "blocks.{i}.attn.v_bias"),
        *_both("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
        *_both("blocks.{i}.norm2", "blocks.{i}.norm2"),
        *_both("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *_both("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        *_both("linear_projection", "linear_projection"),
    ),
    {"qk_norm": False, "rotary": False},
)

DIFFUSERS_DIT = Layout(
    "diffusers' DiTTransformer2DModel",
    "dit",
    (
        *_both("x_embedder.proj", "pos_embed.proj"),
        *_both("t_embedder.mlp.0", "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1"),
        *_both("t_embedder.mlp.2", "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2"),
        Entry("y_embedder.embedding_table.weight", ("transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight",)),
        *_both("blocks.{i}.attn.qkv", *(f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv")),
        *_both("blocks.{i}.attn.proj", "transformer_blocks.{i}.attn1.to_out.0"),
        *_both("blocks.{i}.mlp.fc1", "transformer_blocks.{i}.ff.net.0.proj"),
        *_both("blocks.{i}.mlp.fc2", "transformer_blocks.{i}.ff.net.2"),
        *_both("blocks.{i}.adaLN_modulation.1", "transformer_blocks.{i}.norm1.linear"),
        *_both("final_layer.adaLN_modulation.1", "proj_out_1"),
        *_both("final_layer.linear", "proj_out_2"),
    ),
    {**_DIT, "frequency_shift": 1},
)

DIFFUSERS_SD3 = Layout(
    "diffusers' SD3Transformer2DModel",
    "mmdit",
    (
        *_both("x_embedder.proj", "pos_embed.proj"),
        Entry("positions", ("pos_embed.pos_embed",)),
        *_both("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        *_both("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        *_both("pooled_embedder.0", "time_text_embed.text_embedder.linear_1"),
        *_both("pooled_embedder.2", "time_text_embed.text_embedder.linear_2"),
        *_both("context_embedder", "context_embedder"),
        *_both("blocks.{i}.image.adaLN_modulation.1", "transformer_blocks.{i}.norm1.linear"),
        *_both("blocks.{i}.text.adaLN_modulation.1", "transformer_blocks.{i}.norm1_context.linear"),
        *_both("blocks.{i}.image.qkv", *(f"transformer_blocks.{{i}}.attn.to_{part}" for part in "qkv")),
        *_both("blocks.{i}.text.qkv", *(f"transformer_blocks.{{i}}.attn.add_{part}_proj" for part in "qkv")),
        Entry("blocks.{i}.attn.qk_norm.q_weight_image", ("transformer_blocks.{i}.attn.norm_q.weight",)),
        Entry("blocks.{i}.attn.qk_norm.k_weight_image", ("transformer_blocks.{i}.attn.norm_k.weight",)),
        Entry("blocks.{i}.attn.qk_norm.q_weight_text", ("transformer_blocks.{i}.attn.norm_added_q.weight",)),
        Entry("blocks.{i}.attn.qk_norm.k_weight_text", ("transformer_blocks.{i}.attn.norm_added_k.weight",)),
        *_both("blocks.{i}.image.proj", "transformer_blocks.{i}.attn.to_out.0"),
        *_both("blocks.{i}.text.proj", "transformer_blocks.{i}.attn.to_add_out"),
        *_both("blocks.{i}.image.mlp.fc1", "transformer_blocks.{i}.ff.net.0.proj"),
        *_both("blocks.{i}.image.mlp.fc2", "transformer_blocks.{i}.ff.net.2"),
        *_both("blocks.{i}.text.mlp.fc1", "transformer_blocks.{i}.ff_context.net.0.proj"),
        *_both("blocks.{i}.text.mlp.fc2", "transformer_blocks.{i}.ff_context.net.2"),
        *_both("final_layer.adaLN_modulation.1", "norm_out.linear"),
        *_both("final_layer.linear", "proj_out"),
    ),
    {"form": "dual", "norm": "layer", "rotary": False, "controls": {}, "pooled": None, "masked_text": False},
)
