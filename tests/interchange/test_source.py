"""What can be opened, and what is refused: files of every kind, as they come."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fasttrain.errors import UserError
from fasttrain.init_from import InitFrom
from fasttrain.interchange.names import DIT, MIN_SNR_VIT
from fasttrain.interchange.rules import plan
from fasttrain.interchange.source import Source, open_source
from tests.interchange.networks import batch, begun, config, fitting, network, spec


def opened(place: Path, **asked: Any) -> Source:
    return open_source(InitFrom(source=str(place), **asked))


def refused(place: Path, *named: str, **asked: Any) -> None:
    with pytest.raises(UserError) as error:
        opened(place, **asked)
    assert all(words in str(error.value) for words in ("init_from", *named)), error.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_official_dit_is_known_by_its_names(tmp_path: Path, dtype: torch.dtype):
    model = config("dit", learn_sigma=True)
    built = network(model).to(dtype)
    save_file(dict(built.state_dict()), tmp_path / "dit.safetensors")
    source = opened(tmp_path / "dit.safetensors")
    assert source.layout == DIT.name
    read = {"name": "dit", "depth": 2, "width": 64, "channels": 4, "patch": 2, "input_size": 8}
    assert source.model == {**DIT.always, **read} and spec(model).items() >= DIT.always.items()
    made = plan(fitting(source, model))
    assert {row.how for row in made.rows} == {"taken"} and list(made.left_out) == ["pos_embed"]
    assert any("number of heads" in note for note in made.notes)
    x, t, cond = batch()
    with torch.no_grad():
        again = begun(made, model.build())
        assert all(torch.equal(again.state_dict()[row.name], built.state_dict()[row.name].float()) for row in made.rows)
        assert torch.isfinite(again(x, t, cond)).all()


def test_a_vit_of_the_papers_code_is_known_by_its_names(tmp_path: Path):
    model = config("vit")
    built = network(model)
    save_file(dict(built.state_dict()), tmp_path / "vit.safetensors")
    source = opened(tmp_path / "vit.safetensors")
    assert source.layout == MIN_SNR_VIT.name and source.model["input_size"] == 8 and source.model["depth"] == 2
    with torch.no_grad():
        assert torch.equal(begun(plan(fitting(source, model)), model.build())(*batch()), built(*batch()))


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("dit", {"norm": "rms"}),
        ("dit", {"frequency_shift": 1}),
        ("dit", {"norm_eps": 1e-5}),
        ("dit", {"qk_norm": True}),
        ("dit", {"qk_norm": True, "rotary": True}),
        ("vit", {"qk_norm": True, "rotary": True}),
    ],
)
def test_what_a_files_kind_says_of_its_model_is_compared(tmp_path: Path, name: str, here: dict[str, Any]):
    save_file(dict(network(config(name)).state_dict()), tmp_path / "m.safetensors")
    source = opened(tmp_path / "m.safetensors")

    def told(model: Any) -> set[str]:
        return {note.split(" is ")[0] for note in plan(fitting(source, model)).notes if note.startswith("model.")}

    assert told(config(name)) == set() and told(config(name, **here)) == {f"model.{key}" for key in here}


def test_positions_that_no_model_here_computes_with_are_refused(tmp_path: Path):
    tensors = dict(network(config("dit")).state_dict())
    save_file({**tensors, "pos_embed": tensors["pos_embed"].flip(1)}, tmp_path / "dit.safetensors")
    refused(tmp_path / "dit.safetensors", "positions that are not sin-cos ones")


def test_pickles_are_refused_unread_with_a_command_that_converts_them(tmp_path: Path):
    canary = tmp_path / "canary"

    class Command:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {canary}",)

    for name in ("dit.pt", "dit.pth", "dit.ckpt", "dit.bin", "named.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Command()))
        refused(tmp_path / name, "is a pickle", "once: python -c", "weights_only=True")
    torch.save({"a": torch.ones(2)}, tmp_path / "zipped.safetensors")
    refused(tmp_path / "zipped.safetensors", "is a pickle")
    assert not canary.exists()


def test_the_command_converts(tmp_path: Path):
    tensors = network(config("dit")).state_dict()
    torch.save({"ema": tensors, "opt": {}, "args": None}, tmp_path / "the dit.pt")
    with pytest.raises(UserError) as error:
        opened(tmp_path / "the dit.pt")
    subprocess.run(f"{sys.executable} {str(error.value).split('once: python ')[1]}", shell=True, check=True)
    assert torch.equal(opened(tmp_path / "the dit.safetensors").tensors.read("x_embedder.proj.bias"), tensors["x_embedder.proj.bias"])


def test_places_that_cannot_be_read():
    for place in ("x" * 5000, "/dev/null/x", "/dev/zero", "/proc/self/mem", "/etc/passwd", "~", "/"):
        refused(Path(place))


def test_places_that_hold_no_weights(tmp_path: Path):
    refused(tmp_path / "nowhere", "no such folder or file")
    refused(tmp_path, "neither a run folder", "config.json")
    (tmp_path / "cut.safetensors").write_bytes(b"")
    refused(tmp_path / "cut.safetensors", "no sound safetensors file")
    save_file(dict(network(config("dit")).state_dict()), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-100])
    refused(tmp_path / "cut.safetensors", "no sound safetensors file")
    (tmp_path / "cut.safetensors").write_bytes(content[:300])
    refused(tmp_path / "cut.safetensors", "no sound safetensors file")
    refused(tmp_path / "whole.safetensors", "holds one set of weights", weights="ema")
    save_file({"label_emb.weight": torch.ones(2), "input_blocks.0.0.weight": torch.ones(2)}, tmp_path / "unet.safetensors")
    refused(tmp_path / "unet.safetensors", "of no layout known here", "label_emb.weight")
    save_file({"pos_embed": torch.ones(2, dtype=torch.int64)}, tmp_path / "integers.safetensors")
    refused(tmp_path / "integers.safetensors", "pos_embed as I64")


@pytest.mark.parametrize("metadata", [{"model": "{"}, {"model": "[]"}, {"model": "{}", "config": "3"}, {"model": "{}", "data": "nan,"}])
def test_an_export_with_a_damaged_header_is_told(tmp_path: Path, metadata: dict[str, str]):
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors", metadata)
    refused(tmp_path / "m.safetensors", "export it again")


def test_an_export_may_say_anything_of_itself_and_is_only_compared(tmp_path: Path):
    """Values of the wrong type in a header are differences, not crashes."""
    tensors = dict(network(config("dit")).state_dict())
    for key, value in {
        "name": 3,
        "depth": "two",
        "patch": [2],
        "input_size": {},
        "controls": None,
        "num_classes": -1,
        "heads": 1e99,
    }.items():
        model = {**spec(config("dit")), key: value}
        data = {"classes": 7, "kind": [], "vae": "x", "scale": {"a": 1}}
        diffusion = {"diffusion": {"schedule": 5, "prediction": []}}
        header = {"model": json.dumps(model), "data": json.dumps(data), "config": json.dumps(diffusion)}
        save_file(tensors, tmp_path / "m.safetensors", header)
        with contextlib.suppress(UserError):
            plan(fitting(opened(tmp_path / "m.safetensors"), config("dit")))
