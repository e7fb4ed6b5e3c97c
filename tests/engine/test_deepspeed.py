"""DeepSpeed's own settings: only what the run's config does not say, and nothing unknown."""

import json

import pytest

from fasttrain.engine.deepspeed import read_settings, zero_stage
from fasttrain.errors import UserError


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
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, r"offload_optimizer is not supported"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, r"zero_optimization\.offload_param is not supported"),
    ],
)
def test_what_belongs_elsewhere_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        read_settings(settings)


def test_a_stage_that_is_none():
    with pytest.raises(UserError, match=r"stage must be 0, 1, 2 or 3, got 4"):
        zero_stage({"zero_optimization": {"stage": 4}})


@pytest.mark.parametrize(("text", "message"), [(None, "no file"), ("{", "is not JSON"), ("[1]", "must hold an object")])
def test_files_that_are_none(tmp_path, text, message):
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(str(path))
