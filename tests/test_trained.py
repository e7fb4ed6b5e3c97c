"""A trained network taken from its run folder: only with the config it was trained with, and from anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fasttrain.config import parse_config
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.trained import Trained
from fasttrain.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import plain_config, zero

CPU = torch.device("cpu")


def _fit(processes: Processes, raw: dict[str, Any]) -> None:
    Trainer(parse_config(raw, "test"), processes).fit()


@pytest.fixture
def run(tmp_path: Path, digits: Path) -> Path:
    """Two steps of a run whose DeepSpeed settings came from a file that is gone."""
    settings = tmp_path / "zero2.json"
    settings.write_text(json.dumps(zero(2)))
    run_ranks(1, _fit, plain_config(tmp_path / "run", digits, deepspeed=str(settings), training={"steps": 2}))
    settings.unlink()
    return tmp_path / "run"


def test_a_run_folder_stands_alone(run: Path):
    trained = Trained.load(run, "ema", CPU)
    assert (trained.step, trained.weights, trained.config.zero_stage) == (2, "ema of 500 images", 2)


@pytest.mark.parametrize(("section", "key", "value"), [("diffusion", "prediction", "v"), ("model", "depth", 1), ("model", "depth", 3)])
def test_weights_of_another_config_are_refused(run: Path, section: str, key: str, value: object):
    path = run / "config.yaml"
    raw = yaml.safe_load(path.read_text())
    raw[section][key] = value
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=rf"was trained with .*{key}.*this config says"):
        Trained.load(run, "ema", CPU)
