"""DeepSpeed's own settings: only what the run's config does not say, and nothing unknown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.engine.deepspeed import accumulates_in_bf16, read_settings, zero_stage
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero


def test_a_file_and_a_mapping_are_read_alike(tmp_path):
    settings = {"zero_optimization": {"stage": 3, "overlap_comm": True}}
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(settings))
    assert read_settings(str(path)) == read_settings(settings) == settings
    assert zero_stage(settings) == 3
    assert zero_stage({}) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 8}, r"'train_batch_size' conflicts with the run's config; remove it there and set training\.global_batch"),
        ({"bf16": {"enabled": True}}, r"set training\.precision instead"),
        ({"gradient_clipping": 1.0}, r"set training\.clip instead"),
        ({"optimizer": {"type": "Adam"}}, r"set optimizer instead"),
        ({"zero_optimisation": {}}, r"unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
        ({"zero_optimization": 3}, r"zero_optimization must be a mapping"),
        ({"zero_optimization": {"stge": 3}}, r"unknown key zero_optimization\.stge; did you mean 'stage'"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, r"round_robin_gradients is not supported yet"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, r"offload_optimizer must be {\"device\": \"cpu\"}"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, r"offload_optimizer must be .*, got 'cpu'"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 1}}},
            r"offload_optimizer: unknown key",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"offload_optimizer needs ZeRO: set zero",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, r"zero_optimization\.offload_param is not supported"),
    ],
)
def test_what_belongs_elsewhere_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        read_settings(settings)


def test_a_stage_that_is_none():
    with pytest.raises(UserError, match=r"stage must be 0, 1, 2 or 3, got 4"):
        read_settings({"zero_optimization": {"stage": 4}})


@pytest.mark.parametrize(("text", "message"), [(None, "no file"), ("{", "is not JSON"), ("[1]", "must hold an object")])
def test_files_that_are_none(tmp_path, text, message):
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(str(path))


def _first_gradients(processes: Processes, raws: list[dict[str, Any]]) -> list[Tensor]:
    """The gradient of each config's first step, from the first moment that it leaves."""
    gradients = []
    for raw in raws:
        trainer = start(processes, raw)
        trainer.train_step()
        moments = trainer.state.full("exp_avg")
        gradients.append(torch.cat([moments[name].flatten() for name in sorted(moments)]).double())
        trainer.loader.close()
        trainer.engine.destroy()
    return gradients


@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_micro_batches_are_summed_in_fp32_from_stage_2_on(world_size: int, tmp_path: Path, digits: Path):
    def raw(name: str, stage: int, precision: str, micro_batch: int) -> dict[str, Any]:
        training = {"precision": precision, "global_batch": 128, "micro_batch": micro_batch}
        return plain_config(tmp_path / name, digits, deepspeed=zero(stage), training=training)

    raws = [raw("exact", 1, "fp32", 128 // world_size), raw("two", 2, "bf16", 1), raw("three", 3, "bf16", 1), raw("one", 1, "bf16", 1)]
    exact, *rounded = run_ranks(world_size, _first_gradients, raws)[0]
    two, three, one = (float((gradient - exact).norm() / exact.norm()) for gradient in rounded)
    assert two < 4e-3 and three < 4e-3
    assert accumulates_in_bf16(1, "bf16", 128) and one > 2 * two
