"""The run folder, and what a run must share with its shards and its checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.config import RunConfig
from fasttrain.data.index import Index, VaeRecord, read_index
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.run import check_identity, environment, identity, read_run, resolve, write_folder
from tests.runs import config


@pytest.fixture
def index(digits: Path) -> Index:
    return read_index(digits)


@pytest.fixture
def processes() -> Processes:
    return Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None)  # type: ignore[arg-type] (a run folder needs no group)


def run_config(tmp_path: Path, digits: Path, **sections: Any) -> RunConfig:
    return config(run_dir=tmp_path / "run", shards=digits, **sections)


def refusal(index: Index, wanted: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        resolve(wanted, index)
    return str(error.value)


def test_open_fields_of_the_model_come_from_the_shards(tmp_path, digits, index):
    model = resolve(run_config(tmp_path, digits), index).model
    assert (model.channels, model.input_size, model.num_classes) == (1, 8, 10)


def test_what_the_config_says_of_the_model_stays(tmp_path, digits, index):
    model = resolve(run_config(tmp_path, digits, model={"num_classes": 12}), index).model
    assert model.num_classes == 12
    assert resolve(run_config(tmp_path, digits, model={"num_classes": 0}), index).model.null_label is None


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"channels": 3}, ("model.channels 3", "1 x 8 x 8")),
        ({"input_size": 16}, ("model.input_size 16", "1 x 8 x 8")),
        ({"num_classes": 9}, ("model.num_classes 9 is too small", "10 classes")),
        ({"patch": 3}, ("model.input_size 8 is not divisible by model.patch 3", "input_size comes from")),
    ],
)
def test_shards_that_do_not_fit_the_model(tmp_path, digits, index, model, named):
    message = refusal(index, run_config(tmp_path, digits, model=model))
    assert str(digits) in message and all(words in message for words in named)


@pytest.mark.parametrize("form", ["shared", "dual"])
@pytest.mark.parametrize(("key", "value"), [("pooled", True), ("masked_text", True), ("text_pooled", 768)])
def test_a_model_of_classes_does_not_pass_over_what_it_is_asked_to_do_with_text(tmp_path, digits, index, form, key, value):
    mmdit = {"name": "mmdit", "depth": 1, "width": 16, "heads": 2, "patch": 2, "form": form}
    assert refusal(index, run_config(tmp_path, digits, model={**mmdit, key: value})).startswith(
        f"model.{key} is {value}, and there is no text"
    )
    made = resolve(run_config(tmp_path, digits, model={**mmdit, "pooled": False, "masked_text": False}), index).model
    assert (made.pooled, made.masked_text, made.num_classes) == (False, False, 10)


@pytest.mark.parametrize(
    ("guidance", "named"),
    [
        ({"resolution": 2}, "sampling.guidance.resolution 2 multiplies what guidance adds, and sampling.guidance.scale is 1"),
        ({"interval": [0.2, 0.8]}, "sampling.guidance.interval [0.2, 0.8] limits guidance, and there is none with scale 1 and controls 1"),
    ],
)
def test_guidance_that_changes_nothing_is_not_passed_over(tmp_path, digits, index, guidance, named):
    assert refusal(index, run_config(tmp_path, digits, sampling={"guidance": guidance})).startswith(named)
    resolve(run_config(tmp_path, digits, sampling={"guidance": {**guidance, "scale": 1.5}}), index)


def test_control_guidance_is_limited_by_an_interval_at_scale_1(tmp_path, digits, index):
    limited = {"controls": 1.5, "interval": [0.2, 0.8]}
    resolve(run_config(tmp_path, digits, sampling={"guidance": limited}), index)
    assert "resolution 2 multiplies" in refusal(index, run_config(tmp_path, digits, sampling={"guidance": {**limited, "resolution": 2}}))


def test_shards_must_be_square(tmp_path, digits, index):
    assert "holds 8 x 4 samples" in refusal(index.model_copy(update={"shape": (1, 8, 4)}), run_config(tmp_path, digits))


def test_latents_of_another_vae_are_refused(tmp_path, digits, index):
    wanted = run_config(tmp_path, digits, data={"vae": "owner/this"})
    assert "holds images, not latents" in refusal(index, wanted)
    latents = index.model_copy(update={"vae": VaeRecord(id="owner/that", scaling_factor=1.0)})
    message = refusal(latents, wanted)
    assert "data.vae is 'owner/this'" in message and "made with 'owner/that'" in message


def test_a_folder_reads_back_as_what_was_written(tmp_path, digits, index, processes):
    made = resolve(run_config(tmp_path, digits), index)
    write_folder(made, index, processes)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    again, again_index = read_run(moved)
    assert again_index == index
    assert again == made.model_copy(update={"run_dir": moved})


def test_the_environment_names_versions_and_nothing_private(tmp_path, digits, index, processes):
    write_folder(run_config(tmp_path, digits), index, processes)
    text = (tmp_path / "run" / "environment.json").read_text()
    told = json.loads(text)
    assert told["packages"]["torch"] == environment(processes)["packages"]["torch"] and told["world_size"] == 1
    assert str(Path.home()) not in text and str(tmp_path) not in text


@pytest.mark.parametrize("damage", [lambda run: (run / "data.json").unlink(), lambda run: (run / "data.json").write_text("{}")])
def test_a_damaged_folder_names_the_file(tmp_path, digits, index, processes, damage):
    write_folder(run_config(tmp_path, digits), index, processes)
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.json cannot be read"):
        read_run(tmp_path / "run")


def test_any_other_folder_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no run folder: it has no config\.yaml"):
        read_run(tmp_path)


def test_speed_and_length_may_change_between_starts(tmp_path, digits, index):
    first = resolve(run_config(tmp_path, digits), index)
    later = resolve(
        run_config(
            tmp_path,
            digits,
            kernels={"default": "reference", "adaln": "auto"},
            attention="math",
            model={"checkpoint_blocks": True},
            training={"steps": 99, "micro_batch": 1, "compile": True, "deterministic": True},
            optimizer={"learning_rate": 1e-5},
            diffusion={"label_drop": 0.3},
            deepspeed={"zero_optimization": {"stage": 3}},
        ),
        index,
    )
    check_identity(identity(later, index), identity(first, index), Path("step-1"))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"depth": 3}}, "model depth 2, this config says depth 3"),
        ({"diffusion": {"prediction": "v"}}, "diffusion.prediction name 'x0', this config says name 'v'"),
        ({"diffusion": {"schedule": {"name": "cosine", "num_timesteps": 500}}}, "diffusion.schedule num_timesteps 1000"),
        ({"seed": 1}, "seed 0, this config says 1"),
        ({"data": {"held_out": 5}}, "data held_out 0, this config says held_out 5"),
    ],
)
def test_what_makes_it_another_run_is_refused_by_name(tmp_path, digits, index, sections, named):
    saved = identity(resolve(run_config(tmp_path, digits), index), index)
    other = identity(resolve(run_config(tmp_path, digits, **sections), index), index)
    with pytest.raises(UserError) as error:
        check_identity(other, json.loads(json.dumps(saved)), Path("step-1"))
    assert named in str(error.value) and "choose another run_dir" in str(error.value)


def test_what_one_side_lacks_or_differs_in_late_is_named_once(tmp_path, digits, index):
    """A key that is null here and absent there, as after an update; and lists that begin alike."""
    mine = identity(resolve(run_config(tmp_path, digits), index), index)
    assert mine["data"]["text"] is None
    older = {**mine, "data": {key: value for key, value in mine["data"].items() if key != "text"}}
    shards = {**mine["data"], "shards": ["a" * 32, "b" * 32, "c" * 32]}
    for saved, now, named in (
        (older, mine, "trained with data text (not given), this config says text None:"),
        (mine, older, "trained with data text None, this config says text (not given):"),
        ({key: value for key, value in mine.items() if key != "seed"}, mine, "trained with seed (not given), this config says 0:"),
        (
            {**mine, "data": {**shards, "shards": ["a" * 32, "b" * 32, "d" * 32]}},
            {**mine, "data": shards},
            f"shards[2] '{'d' * 32}', this config says shards[2] '{'c' * 32}'",
        ),
    ):
        with pytest.raises(UserError) as error:
            check_identity(now, saved, Path("step-1"))
        assert named in str(error.value), error.value


def test_other_shards_are_another_run(tmp_path, digits, index):
    mine = resolve(run_config(tmp_path, digits), index)
    changed = index.model_copy(update={"labels_xxh3": "0" * 32})
    with pytest.raises(UserError, match="data labels"):
        check_identity(identity(mine, changed), identity(mine, index), Path("step-1"))


def test_latents_of_another_scale_are_another_run(tmp_path, digits, index):
    mine, other = (run_config(tmp_path, digits, data={"normalise": scale}) for scale in ("channel", "vae"))
    with pytest.raises(UserError, match="data normalise 'vae', this config says normalise 'channel'"):
        check_identity(identity(resolve(mine, index), index), identity(resolve(other, index), index), Path("step-1"))


def test_identity_is_plain_json(tmp_path, digits, index):
    mine = identity(resolve(run_config(tmp_path, digits), index), index)
    assert json.loads(json.dumps(mine)) == mine


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, digits, index, processes):
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(UserError, match=r"run_dir .*run: cannot write there"):
        write_folder(run_config(tmp_path, digits), index, processes)
