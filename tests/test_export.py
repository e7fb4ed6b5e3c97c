"""An export is the model and nothing that was learned beside it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fasttrain.building import build_network
from fasttrain.cli import main
from fasttrain.config import parse_config
from fasttrain.data.index import read_index
from fasttrain.diffusion.uncertainty import add_uncertainty
from fasttrain.run import resolve
from fasttrain.trained import Trained
from tests.runs import plain_config


@pytest.mark.parametrize("layout", ["safetensors", "diffusers"])
def test_a_learned_uncertainty_stays_behind(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str):
    raw = plain_config(tmp_path / "run", digits)
    raw["model"] = {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2, "frequency_shift": 1}
    index = read_index(digits)
    config = resolve(parse_config(raw, "test"), index)
    network = build_network(config)
    wanted = dict(network.state_dict())
    add_uncertainty(network, config.diffusion.schedule)
    monkeypatch.setattr(Trained, "load", lambda *_: Trained(config, index, network, "raw", 1))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", layout]) == 0
    if layout == "safetensors":
        found = load_file(tmp_path / "out")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    else:
        assert (tmp_path / "out" / "config.json").is_file()
