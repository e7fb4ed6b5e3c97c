"""The same outputs from diffusers' classes and from ours, both ways, in fp32, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from fasttrain.cond import Cond
from fasttrain.errors import UserError
from fasttrain.init_from import InitFrom
from fasttrain.interchange import diffusers
from fasttrain.interchange.rules import plan
from fasttrain.interchange.source import open_source
from tests.interchange.networks import TEXT, batch, begun, config, disturb, fitting, network, spec

MOST = 2e-6  # of outputs of about 1: fp32 sums in another order, where there is one (DiT: none)
FACTS: dict[str, Any] = {
    "config": {"diffusion": {"schedule": {"name": "flow"}, "prediction": {"name": "flow"}}},
    "data": {"vae": None, "text": None, "scale": None, "shift": None},
    "weights": "ema of 500 images",
    "step": 3,
}

THEIR_DIT: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
THEIR_SD3: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 4,
}


def exported(folder: Path, model: Any, built: nn.Module) -> list[str]:
    return diffusers.write_folder(folder, {**FACTS, "model": spec(model)}, built.state_dict())


@torch.no_grad()
def ours(built: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return built(x, t, cond)


@torch.no_grad()
def of_dit(model: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return model(x, timestep=t, class_labels=cond.labels).sample[:, : x.shape[1]]


@torch.no_grad()
def of_sd3(model: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    assert cond.text is not None
    return model(x, encoder_hidden_states=cond.text.tokens, pooled_projections=cond.text.pooled, timestep=t).sample


def loaded(kind: Any, folder: Path) -> Any:
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    return model


def error(one: Tensor, other: Tensor) -> float:
    assert 0.1 < one.std() < 100, "outputs that say something"
    return float((one - other).abs().max())


@pytest.mark.parametrize("fields", [{}, {"learn_sigma": True}, {"norm_eps": 1e-5}], ids=["plain", "sigma", "eps"])
def test_a_dit_goes_to_diffusers(tmp_path: Path, fields: dict[str, Any]):
    model = config("dit", frequency_shift=1, **fields)
    built = network(model)
    assert exported(tmp_path, model, built) == []
    theirs = loaded(DiTTransformer2DModel, tmp_path)
    assert error(ours(built, *batch()), of_dit(theirs, *batch())) < MOST


def test_a_dit_with_published_frequencies_needs_one_more_line_in_diffusers(tmp_path: Path):
    model = config("dit")
    built = network(model)
    comment, line = exported(tmp_path, model, built)
    theirs = loaded(DiTTransformer2DModel, tmp_path)
    assert comment.startswith("# ") and line in (tmp_path / "README.md").read_text()
    assert error(ours(built, *batch()), of_dit(theirs, *batch())) > 100 * MOST, "stock frequencies are others"
    exec(line, {"model": theirs})
    assert error(ours(built, *batch()), of_dit(theirs, *batch())) < MOST


@pytest.mark.parametrize("their_eps", [1e-5, 1e-6])
def test_a_dit_comes_from_diffusers(tmp_path: Path, their_eps: float):
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(**THEIR_DIT, norm_eps=their_eps).eval()
    disturb(theirs)
    _one_embedder(theirs)
    theirs.save_pretrained(tmp_path)
    source = open_source(InitFrom(source=str(tmp_path)))
    model = config("dit", learn_sigma=True, frequency_shift=1, norm_eps=their_eps)
    made = plan(fitting(source, model))
    assert {row.how for row in made.rows} == {"taken"} and not made.left_out
    assert error(ours(begun(made, model.build()), *batch()), of_dit(theirs, *batch())) < MOST
    other_eps = config("dit", learn_sigma=True, frequency_shift=1, norm_eps=1.1e-5 - their_eps)
    assert error(ours(begun(plan(fitting(source, other_eps)), other_eps.build()), *batch()), of_dit(theirs, *batch())) > MOST
    as_published = plan(fitting(source, config("dit", learn_sigma=True)))
    assert any("model.frequency_shift is 1 there and 0 here" in note for note in as_published.notes)
    assert any("model.norm_eps" in note for note in as_published.notes) is (their_eps != 1e-6)
    turned = config("dit", learn_sigma=True, frequency_shift=1, norm_eps=their_eps, qk_norm=True, rotary=True, norm="rms")
    told = {note.split(" is ")[0] for note in plan(fitting(source, turned)).notes if "there and" in note}
    assert told == {"model.qk_norm", "model.rotary", "model.norm"}


def _one_embedder(theirs: Any) -> None:
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())


def test_a_dit_trained_in_diffusers_whose_embedders_have_parted_is_refused(tmp_path: Path):
    theirs = DiTTransformer2DModel(**THEIR_DIT)
    theirs.save_pretrained(tmp_path)
    source = open_source(InitFrom(source=str(tmp_path)))
    with pytest.raises(UserError, match="in every block, and its blocks differ"):
        source.tensors.read("t_embedder.mlp.0.weight")


@pytest.mark.parametrize(
    "fields", [{}, {"qk_norm": False}, {"position_table": 9}, {"position_base": 2}], ids=lambda f: "-".join(f) or "plain"
)
def test_an_mmdit_goes_to_diffusers(tmp_path: Path, fields: dict[str, Any]):
    model = config("mmdit", form="dual", **TEXT, **{"depth": 3, **fields})
    built = network(model)
    assert exported(tmp_path, model, built) == []
    theirs = loaded(SD3Transformer2DModel, tmp_path)
    assert error(ours(built, *batch()), of_sd3(theirs, *batch())) < MOST


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("table", [4, 11])
def test_an_mmdit_comes_from_diffusers(tmp_path: Path, qk_norm: str | None, table: int):
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(**{**THEIR_SD3, "pos_embed_max_size": table}, qk_norm=qk_norm).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / diffusers.SHARDED).exists()
    source = open_source(InitFrom(source=str(tmp_path)))
    fields = {"qk_norm": qk_norm is not None, "position_table": None if table == 4 else table}
    model = config("mmdit", form="dual", **TEXT, **{"depth": 3, **fields})
    made = plan(fitting(source, model))
    assert {row.how for row in made.rows} == {"taken"} and list(made.left_out) == ["positions"]
    assert not any("model." in note for note in made.notes), made.notes
    assert error(ours(begun(made, model.build()), *batch()), of_sd3(theirs, *batch())) < MOST


def test_both_ways_is_bit_for_bit_the_same(tmp_path: Path):
    for name, fields in (("dit", {"learn_sigma": True}), ("mmdit", {"form": "dual", **TEXT})):
        model = config(name, **fields)
        built = network(model)
        exported(tmp_path / name, model, built)
        made = plan(fitting(open_source(InitFrom(source=str(tmp_path / name))), model))
        again = begun(made, model.build()).state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in built.state_dict().items())


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("dit", {"qk_norm": True, "rotary": True}, ["model.qk_norm", "model.rotary"]),
        ("dit", {"num_classes": 0}, ["model.num_classes 0"]),
        ("dit", {"norm": "rms"}, ["model.norm rms"]),
        ("dit", {"conditioning": "attention"}, ["model.conditioning attention"]),
        ("dit", {"position_base": 2}, ["model.position_base"]),
        ("dit", {"controls": {"flip": "high"}}, ["model.controls"]),
        ("mmdit", {"form": "shared", **TEXT}, ["model.form shared"]),
        ("mmdit", {"form": "dual"}, ["a model of classes"]),
        ("mmdit", {"form": "dual", **TEXT, "pooled": False}, ["model.pooled false"]),
        ("mmdit", {"form": "dual", **TEXT, "rotary": True}, ["model.rotary"]),
        ("mmdit", {"form": "dual", **TEXT, "masked_text": True}, ["model.masked_text"]),
        ("vit", {}, ["no class for the model vit"]),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express_is_refused_by_name(tmp_path: Path, name: str, fields: dict[str, Any], named: list[str]):
    model = config(name, **fields)
    with pytest.raises(UserError) as refused:
        exported(tmp_path, model, model.build())
    assert all(words in str(refused.value) for words in named) and not list(tmp_path.iterdir())


def _edit(**keys: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return edit


def _pickled(folder: Path) -> None:
    (folder / diffusers.WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_edit(_class_name="UNet2DModel"), ["'UNet2DModel'", "DiTTransformer2DModel"]),
        (_edit(_class_name=["DiTTransformer2DModel"]), ["the choices are"]),
        (_edit(activation_fn="geglu"), ["activation_fn is 'geglu'", "only 'gelu-approximate'"]),
        (_edit(num_layers="two"), ["num_layers is 'two'"]),
        (_edit(patch_size=0), ["patch_size is 0"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json is not JSON"]),
        (lambda folder: (folder / "config.json").write_text("[1]"), ["config.json holds no object"]),
        (lambda folder: (folder / diffusers.WEIGHTS).unlink(), ["has no weights", "save_pretrained"]),
        (_pickled, ["diffusion_pytorch_model.bin", "run code when they are read"]),
        (lambda folder: (folder / diffusers.WEIGHTS).write_bytes(b"x" * 100), ["no sound safetensors file"]),
    ],
)
def test_folders_that_cannot_be_taken(tmp_path: Path, damage: Callable[[Path], None], named: list[str]):
    DiTTransformer2DModel(**THEIR_DIT).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as refused:
        open_source(InitFrom(source=str(tmp_path)))
    assert all(words in str(refused.value) for words in ["init_from", *named]), refused.value


def test_a_dit_of_the_hubs_older_folders_is_read(tmp_path: Path):
    """facebook/DiT-XL-2-256 names the class that DiTTransformer2DModel was split from, with its many other keys."""
    DiTTransformer2DModel(**THEIR_DIT).save_pretrained(tmp_path)
    _edit(_class_name="Transformer2DModel", cross_attention_dim=None, num_vector_embeds=None, only_cross_attention=False)(tmp_path)
    assert open_source(InitFrom(source=str(tmp_path))).model["norm_eps"] == 1e-5
    _edit(norm_type="ada_norm_single")(tmp_path)
    with pytest.raises(UserError, match="norm_type is 'ada_norm_single'"):
        open_source(InitFrom(source=str(tmp_path)))


def test_a_list_of_shards_names_only_files_beside_it(tmp_path: Path):
    SD3Transformer2DModel(**THEIR_SD3).save_pretrained(tmp_path, max_shard_size="200KB")
    path = tmp_path / diffusers.SHARDED
    index = json.loads(path.read_text())
    index["weight_map"] = {name: "../elsewhere.safetensors" for name in index["weight_map"]}
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="lists no safetensors files beside it"):
        open_source(InitFrom(source=str(tmp_path)))


def test_a_pipelines_folder_is_its_transformers(tmp_path: Path):
    DiTTransformer2DModel(**THEIR_DIT).save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    assert open_source(InitFrom(source=str(tmp_path))).model["num_classes"] == 10
