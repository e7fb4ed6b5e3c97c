"""What a model takes from another, what it makes anew, and what it refuses: for every difference that a config can have."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.cond import Cond
from fasttrain.diffusion.schedule import Cosine
from fasttrain.diffusion.uncertainty import add_uncertainty
from fasttrain.errors import UserError
from fasttrain.interchange.rules import plan
from tests.interchange.networks import DIFFUSION, IMAGES, TEXT, batch, begun, config, fitting, network, source_of


def moved(there: Any, here: Any, known: dict[str, Any] | None = None, **asked: Any) -> tuple[nn.Module, nn.Module, Any]:
    """The source's network, this config's with what it takes from it, and the plan."""
    built = network(there)
    made = plan(fitting(source_of(there, built, **(known or {})), here, **asked))
    torch.manual_seed(5)
    return built, begun(made, here.build()), made


@torch.no_grad()
def output(built: nn.Module, cond: Cond | None = None, size: int = 8) -> torch.Tensor:
    x, t, conditions = batch(size)
    return built(x, t, cond or conditions)


def fresh(made: Any) -> set[str]:
    return {row.name for row in made.rows if row.how == "fresh"}


@pytest.mark.parametrize("name", ["dit", "vit", "mmdit"])
def test_the_same_model_is_taken_whole(name: str):
    there, here, made = moved(config(name), config(name))
    assert {row.how for row in made.rows} == {"taken"} and not made.notes
    assert torch.equal(output(there), output(here))


@pytest.mark.parametrize("name", ["dit", "vit", "mmdit"])
def test_other_classes_get_a_fresh_table(name: str):
    table = "class_embedding.weight" if name == "vit" else "y_embedder.embedding_table.weight"
    _, _, made = moved(config(name), config(name, num_classes=4))
    assert fresh(made) == {table} and next(row for row in made.rows if row.name == table).why == "10 classes there, 4 here"
    _, _, made = moved(config(name), config(name), known={"data": {**IMAGES, "classes": list("abcdefghij")}})
    assert fresh(made) == {table}
    _, _, made = moved(config(name), config(name), known={"data": {}})
    assert not fresh(made) and any("does not say what it was trained on" in note for note in made.notes)


@pytest.mark.parametrize("name", ["dit", "vit"])
def test_classes_come_and_go(name: str):
    _, here, made = moved(config(name), config(name, num_classes=0))
    assert not fresh(made) and len(made.left_out) == 1 and torch.isfinite(output(here)).all()
    _, here, made = moved(config(name, num_classes=0), config(name))
    assert len(fresh(made)) == 1 and torch.isfinite(output(here)).all()


def test_a_vits_positions_without_the_class_are_those_of_time_and_patches():
    there, here, _ = moved(config("vit"), config("vit", num_classes=0))
    assert torch.equal(here.pos_embed, there.pos_embed[:, [0, *range(2, 18)]])
    there, here, _ = moved(config("vit", num_classes=0), config("vit"))
    assert torch.equal(here.pos_embed[:, [0, *range(2, 18)]], there.pos_embed) and (here.pos_embed[:, 1] == 0).all()


def test_another_resolution_resamples_learned_positions_and_makes_fixed_ones():
    there, here, made = moved(config("vit"), config("vit", input_size=16))
    row = next(row for row in made.rows if row.name == "pos_embed")
    assert (row.how, row.was, row.shape, row.why) == ("resized", (1, 18, 64), (1, 66, 64), "grid 4 to 8, bicubic")
    assert torch.equal(here.pos_embed[:, :2], there.pos_embed[:, :2]) and output(here, size=16).shape[-1] == 16
    _, _, made = moved(config("vit"), config("vit", input_size=16), positions="fresh")
    assert fresh(made) == {"pos_embed"}
    _, _, made = moved(config("dit"), config("dit", input_size=16))
    assert {row.how for row in made.rows} == {"taken"} and not made.left_out
    [note] = made.notes
    assert "set model.position_base=4 diffusion.schedule.rescale=2" in note
    _, _, made = moved(config("dit"), config("dit", input_size=16, position_base=4), diffusion={"schedule": {"rescale": 2.0}})
    assert "as this config provides for" in made.notes[0]


def test_hints_of_a_chain_of_resolutions_add_up():
    known = {"diffusion": {"schedule": {"name": "linear", "rescale": 2.0}}}
    there = config("dit", input_size=16, position_base=4)
    made = plan(
        fitting(
            source_of(there, network(there), **known),
            config("dit", input_size=32),
            diffusion={"schedule": {"name": "linear", "rescale": 1.0}},
        )
    )
    assert "model.position_base=4 diffusion.schedule.rescale=4" in made.notes[0]
    flow = {"schedule": {"name": "flow", "shift": 1.0}}
    made = plan(fitting(source_of(there, network(there), diffusion=flow), config("dit", input_size=32, position_base=4), diffusion=flow))
    assert made.notes[0].endswith("set diffusion.schedule.shift=2")


def test_positions_and_noise_that_mean_others_at_the_same_size_are_told():
    def told(there: dict[str, Any], here: dict[str, Any], was: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
        known = {"diffusion": {**DIFFUSION, "schedule": was}}
        source = config("dit", **there)
        return plan(
            fitting(source_of(source, network(source), **known), config("dit", **here), diffusion={**DIFFUSION, "schedule": now})
        ).notes

    cosine, flow = {"name": "cosine", "rescale": 1.0, "num_timesteps": 1000, "zero_terminal": False}, {"name": "flow", "shift": 2.0}
    noisier = {**cosine, "rescale": 2.0}
    assert told({"position_base": 4}, {}, cosine, cosine) == told({}, {"position_base": 4}, noisier, noisier) == ()
    [note] = told({"position_base": 7}, {}, cosine, cosine)
    assert "8 x 8, this run is at the same size" in note and note.endswith("set model.position_base=7")
    [note] = told({}, {"position_base": 7}, noisier, cosine)
    assert note.endswith("set model.position_base=4 diffusion.schedule.rescale=2")
    assert [note.split(",")[0] for note in told({}, {}, {**cosine, "num_timesteps": 500}, {**cosine, "zero_terminal": True})] == [
        "diffusion.schedule.num_timesteps is 500 there and 1000 here",
        "diffusion.schedule.zero_terminal is False there and True here",
    ]
    size, names = told({}, {}, flow, {**cosine, "num_timesteps": 500})
    assert size.endswith("set diffusion.schedule.rescale=2") and "is 'flow' there and 'cosine' here" in names
    assert told({}, {}, flow, noisier) == (names,), "flow's shift is their rescale"
    third = {**cosine, "rescale": 1 / 3}
    [note] = told({}, {}, third, cosine)
    followed = float(note.rpartition("=")[2])
    assert told({}, {}, third, {**cosine, "rescale": followed}) == (), "a hint that was followed is not told again"


def test_a_target_of_another_number_is_told():
    edm = [{**DIFFUSION, "prediction": {"name": "edm", "sigma_data": d}} for d in (0.5, 1.0)]
    source = source_of(config("dit"), network(config("dit")), diffusion=edm[0])
    assert plan(fitting(source, config("dit"), diffusion=edm[0])).notes == ()
    [note] = plan(fitting(source, config("dit"), diffusion=edm[1])).notes
    assert note.startswith("diffusion.prediction.sigma_data is 0.5 there and 1.0 here")


def test_a_learned_uncertainty_comes_and_goes():
    here = config("dit")
    plain, learned = network(here), network(here)
    add_uncertainty(learned, Cosine())
    shapes = {name: tuple(p.shape) for name, p in learned.named_parameters() if p.requires_grad}
    asked = fitting(source_of(here, plain), here)
    assert fresh(plan(replace(asked, shapes=shapes))) == {"uncertainty.weight"}
    assert {row.how for row in plan(replace(asked, shapes=shapes, source=source_of(here, learned))).rows} == {"taken"}
    assert plan(fitting(source_of(here, learned), here)).left_out == {"uncertainty.weight": "no uncertainty is learned here"}


def test_what_a_model_has_no_field_for_is_told():
    """mmDiT has DiT's own sinusoid and norms, not those of diffusers' copies."""
    _, _, made = moved(config("dit", conditioning="attention", frequency_shift=1, norm_eps=1e-5), config("mmdit", qk_norm=False))
    assert [note.split(",")[0] for note in made.notes] == ["model.frequency_shift is 1 there", "model.norm_eps is 1e-05 there"]
    _, _, made = moved(config("dit", frequency_shift=1, norm_eps=1e-5), config("dit", frequency_shift=1, norm_eps=1e-5))
    assert not made.notes


def test_a_source_that_does_not_say_its_schedule_is_told():
    _, _, made = moved(config("dit"), config("dit"), known={"diffusion": {}})
    [note] = made.notes
    assert "does not say its schedule and target" in note
    _, _, made = moved(config("dit"), config("dit", input_size=16), known={"diffusion": {}})
    assert "diffusion.schedule.rescale=2" in made.notes[0] and len(made.notes) == 2


def test_a_learned_sigma_comes_and_goes_without_changing_the_prediction():
    for there, here in ((False, True), (True, False)):
        one, other, made = moved(config("dit", learn_sigma=there), config("dit", learn_sigma=here))
        assert {row.name for row in made.rows if row.how == "resized"} == {"final_layer.linear.weight", "final_layer.linear.bias"}
        assert torch.equal(output(one), output(other))


@pytest.mark.parametrize(("there", "here"), [({}, {"flip": "high", "size": "low"}), ({"flip": "high"}, {"flip": "high", "size": "low"})])
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_new_controls_change_nothing_at_the_start(name: str, there: dict[str, str], here: dict[str, str]):
    one, other, made = moved(config(name, controls=there, num_timesteps=1000), config(name, controls=here, num_timesteps=1000))
    assert all(".low." in n or not there for n in fresh(made)) and fresh(made)
    x, t, cond = batch()
    columns = [2] if there else []  # height, width, flip: flip alone is the third
    with torch.no_grad():
        before = one(x, t, Cond(cond.labels, controls=cond.controls[:, columns] if there else None))
        after = other(x, t, Cond(cond.labels, controls=cond.controls))
    assert torch.equal(before, after)


def test_controls_that_are_others_or_gone_are_told():
    flip, aspect = ({"controls": {control: "high"}, "num_timesteps": 1000} for control in ("flip", "aspect"))
    _, _, made = moved(config("dit", **flip), config("dit", **aspect))
    assert len(fresh(made)) == 4, "of the same shape, and yet others"
    _, _, made = moved(config("dit", **flip), config("dit"))
    assert not fresh(made) and set(made.left_out.values()) == {"not these controls here"}


def test_the_class_moves_between_norms_and_attention_as_a_fresh_table():
    for there, here in (("adaln", "attention"), ("attention", "adaln")):
        _, other, made = moved(config("dit", conditioning=there), config("dit", conditioning=here))
        assert fresh(made) == {"y_embedder.embedding_table.weight"} and torch.isfinite(output(other)).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_mmdit_that_begins_from_a_dit_with_a_class_token_computes_the_same(qk_norm: bool):
    one, other, made = moved(config("dit", conditioning="attention", qk_norm=qk_norm), config("mmdit", qk_norm=qk_norm))
    assert {row.how for row in made.rows} == {"taken", "copied"} and not made.notes
    torch.testing.assert_close(output(other), output(one), rtol=0, atol=2e-6)


def test_an_mmdit_begins_from_a_dit_of_other_semantics():
    """Its class is no token, or there is text instead: what takes those in is new, and all else is the DiT's."""
    _, other, made = moved(config("dit"), config("mmdit", qk_norm=False))
    assert fresh(made) == {"y_embedder.embedding_table.weight"} and torch.isfinite(output(other)).all()
    _, other, made = moved(config("dit"), config("mmdit", **TEXT))
    new = {name for name in fresh(made) if "qk_norm" not in name}
    assert new == {"context_embedder.weight", "context_embedder.bias"} and "y_embedder.embedding_table.weight" in made.left_out
    assert any("model.qk_norm is False there and True here" in note for note in made.notes) and torch.isfinite(output(other)).all()


def test_an_mmdit_of_classes_becomes_one_of_text_and_back():
    _, other, made = moved(config("mmdit"), config("mmdit", **TEXT))
    assert fresh(made) == {"context_embedder.weight", "context_embedder.bias"} and torch.isfinite(output(other)).all()
    _, other, made = moved(config("mmdit", **TEXT), config("mmdit"))
    assert fresh(made) == {"y_embedder.embedding_table.weight"} and torch.isfinite(output(other)).all()


def test_text_of_another_encoder_gets_fresh_layers():
    dual = {"form": "dual", **TEXT}
    _, _, made = moved(config("mmdit", **dual), config("mmdit", **{**dual, "text_pooled": 7}))
    assert len(fresh(made)) == 4 and all(name.startswith("pooled") for name in fresh(made))
    _, _, made = moved(
        config("mmdit", **dual), config("mmdit", **dual), known={"data": {**IMAGES, "text": "another"}}, data={**IMAGES, "text": "one"}
    )
    assert len(fresh(made)) == 6
    _, _, made = moved(
        config("mmdit", **dual), config("mmdit", **dual), known={"data": {**IMAGES, "text": "one"}}, data={**IMAGES, "text": "one"}
    )
    assert not fresh(made)


def test_another_patch_is_refused_unless_asked_for():
    there, here = config("dit", input_size=8), config("dit", input_size=16, patch=4, position_base=None)
    with pytest.raises(UserError, match=r"model\.patch is 2 in the source and 4 here: set model\.patch=2, or init_from\.patch"):
        moved(there, here)
    _, _, made = moved(there, here, patch="fresh")
    assert fresh(made) == {f"{layer}.{part}" for layer in ("x_embedder.proj", "final_layer.linear") for part in ("weight", "bias")}
    one, other, made = moved(there, here, patch="resize")
    assert {row.how for row in made.rows} == {"taken", "resized"} and not fresh(made)
    x, t, cond = batch()
    grown = resize(x)
    with torch.no_grad():
        torch.testing.assert_close(other(grown, t, cond), resize(one(x, t, cond)), rtol=1e-3, atol=1e-4)


def resize(x: torch.Tensor) -> torch.Tensor:
    """Every patch of 2 x 2 as one of 4 x 4."""
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, 4, 4, 2, 2]
    grown = nn.functional.interpolate(patches.flatten(0, 3)[:, None], size=(4, 4), mode="bilinear", align_corners=False)
    return grown.view(*patches.shape[:4], 4, 4).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


def test_a_longer_table_of_timesteps_is_cut_and_a_shorter_one_refused():
    there, here = config("vit", num_timesteps=4000), config("vit", num_timesteps=1000)
    one, other, _ = moved(there, here)
    assert torch.equal(output(one), output(other))
    with pytest.raises(UserError, match=r"set model\.num_timesteps=1000"):
        moved(here, there)


@pytest.mark.parametrize(
    ("there", "here", "named"),
    [
        (config("dit"), config("dit", depth=3), ["model.depth is 2", "set model.depth=2"]),
        (config("dit"), config("dit", depth=1), ["model.depth is 2"]),
        (config("dit"), config("dit", width=128), ["model.width is 64"]),
        (config("dit"), config("dit", heads=2), ["model.heads is 4"]),
        (config("dit"), config("dit", channels=3), ["model.channels is 4"]),
        (config("dit"), config("vit"), ["model.name is 'dit'", "'vit' here"]),
        (config("dit"), config("mmdit", form="dual"), ["model.name is 'dit'"]),
        (config("mmdit"), config("dit"), ["model.name is 'mmdit'"]),
        (config("mmdit", **TEXT), config("mmdit", form="dual", **TEXT), ["model.form is 'shared'"]),
    ],
    ids=lambda value: "",
)
def test_what_cannot_begin_from_what(there: Any, here: Any, named: list[str]):
    with pytest.raises(UserError) as refused:
        moved(there, here)
    assert all(words in str(refused.value) for words in ["init_from", *named]), refused.value


@pytest.mark.parametrize("depth", [1, 3])
def test_an_unexplained_difference_is_told_with_both_shapes(depth: int):
    """A file that says nothing of its model."""
    there = config("dit")
    silent = {"model": {"name": "dit", "patch": 2}, "data": {}}
    with pytest.raises(UserError, match=r"blocks\.[12]\..* (absent|\[\d+)"):
        moved(there, config("dit", depth=depth), known=silent)
    with pytest.raises(UserError, match=r"x_embedder\.proj\.weight is \[64, 4, 2, 2\] in the source and \[32, 4, 2, 2\] in this model"):
        moved(there, config("dit", width=32), known=silent)


def test_differences_that_change_what_is_computed_are_notes():
    known = {"diffusion": {"schedule": {"name": "linear"}, "prediction": {"name": "v"}}}
    _, _, made = moved(config("dit", norm="rms"), config("dit"), known=known)
    assert [note.split(" here")[0] for note in made.notes] == [
        "model.norm is 'rms' there and 'layer'",
        "diffusion.prediction is 'v' there and 'eps'",
        "diffusion.schedule is 'linear' there and 'cosine'",
    ]


def test_latents_of_another_kind_are_notes():
    sd = {"id": "sd", "revision": None, "xxh3": None}
    latents = {**IMAGES, "kind": "latent", "vae": sd, "shift": [0.0, 1.0], "scale": [0.18, 0.2]}
    for data, named in (
        (latents, None),
        ({**latents, "scale": [0.1801, 0.2]}, None),
        ({**latents, "scale": [0.18, 0.3]}, "scaled otherwise"),
        ({**latents, "shift": None}, "scaled otherwise"),
        ({**latents, "vae": {**sd, "id": "flux"}}, "other autoencoders"),
        (IMAGES, "of the kind 'image'"),
    ):
        _, _, made = moved(config("dit"), config("dit"), known={"data": data}, data=latents)
        assert [named in note for note in made.notes] == ([True] if named else []), made.notes
