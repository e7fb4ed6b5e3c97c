"""Tables of names: every name of theirs has one place, and there and back is the same."""

import pytest
import torch

from fasttrain.errors import UserError
from fasttrain.interchange.names import DIFFUSERS_DIT, DIFFUSERS_SD3, DIT, MIN_SNR_VIT, Layout
from fasttrain.interchange.source import LAYOUTS
from fasttrain.interchange.tensors import of_mapping
from fasttrain.interchange.translation import layout_of, to_ours, to_theirs
from tests.interchange.networks import TEXT, config, network

MODELS = {
    DIT.name: config("dit", learn_sigma=True),
    MIN_SNR_VIT.name: config("vit", num_timesteps=50),
    DIFFUSERS_DIT.name: config("dit"),
    DIFFUSERS_SD3.name: config("mmdit", form="dual", **TEXT),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_there_and_back_is_bit_for_bit_the_same(layout: Layout):
    ours = {name: p.detach() for name, p in network(MODELS[layout.name]).named_parameters()}
    theirs = to_theirs(ours if layout is not DIFFUSERS_DIT else {n: p for n, p in ours.items() if n != "pos_embed"}, layout, depth=2)
    assert layout_of(theirs, LAYOUTS, "here") is layout
    again = to_ours(of_mapping(theirs), layout, "here")
    assert set(again.shapes) == set(ours) - ({"pos_embed"} if layout is DIFFUSERS_DIT else set())
    for name, shape in again.shapes.items():
        assert shape == ours[name].shape and torch.equal(again.read(name), ours[name])


def test_official_names_are_ours():
    assert set(config("dit").build().state_dict()) == {
        name.replace("{i}", str(i)) for e in DIT.entries for name in e.theirs for i in (0, 1)
    }
    vit = config("vit").build().state_dict()
    assert set(vit) == {name.replace("{i}", str(i)) for e in MIN_SNR_VIT.entries for name in e.theirs for i in (0, 1)}


def test_names_of_no_layout_are_told_with_the_nearest():
    names = [*config("dit").build().state_dict(), "blocks.0.attn.relative_position_bias_table", "label_emb.0.weight"]
    with pytest.raises(UserError) as refused:
        layout_of(names, LAYOUTS, "model.safetensors")
    told = str(refused.value)
    assert "the nearest is official DiT" in told and "relative_position_bias_table, label_emb.0.weight" in told and MIN_SNR_VIT.name in told


def test_a_part_that_is_missing_is_told():
    theirs = to_theirs({"blocks.0.attn.qkv.weight": torch.ones(12, 4)}, DIFFUSERS_DIT, depth=1)
    del theirs["transformer_blocks.0.attn1.to_k.weight"]
    with pytest.raises(UserError, match=r"to_q\.weight, transformer_blocks\.0\.attn1\.to_v\.weight, but not all 3 parts"):
        to_ours(of_mapping(theirs), DIFFUSERS_DIT, "here")


def test_parts_that_do_not_stack_are_told():
    theirs = to_theirs({"blocks.0.attn.qkv.weight": torch.ones(12, 4)}, DIFFUSERS_DIT, depth=1)
    theirs["transformer_blocks.0.attn1.to_k.weight"] = torch.ones(4, 5)
    with pytest.raises(UserError, match="which do not stack"):
        to_ours(of_mapping(theirs), DIFFUSERS_DIT, "here")


def test_a_name_without_a_place_is_no_silent_loss():
    with pytest.raises(ValueError, match="has no place for control_embedder"):
        to_theirs({"control_embedder.high.0.weight": torch.ones(1)}, DIFFUSERS_DIT, depth=1)
