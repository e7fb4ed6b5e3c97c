"""A config is data: every mistake at once with its path, numbers are numbers, and what was resolved can be read again."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fasttrain_kernels.dispatch import Kernels

from fasttrain.config import RunConfig, TrainingConfig, load_config, parse_config
from fasttrain.diffusion.weighting import MinSnr
from fasttrain.errors import UserError
from fasttrain.models import MODELS
from fasttrain.models.attention import ATTENTION
from tests.runs import plain_config


def parse(**sections: Any) -> RunConfig:
    return parse_config(plain_config("run", "shards", **sections), "test.yaml")


def told(**sections: Any) -> str:
    with pytest.raises(UserError) as error:
        parse(**sections)
    return str(error.value)


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


MINIMAL = "run_dir: run\ndata: {train: shards}\nmodel: vit-tiny\ntraining: {steps: 10, global_batch: 4}\n"


def test_defaults_are_the_papers(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert config.diffusion.weighting == MinSnr(5.0)
    assert config.optimizer.betas == (0.99, 0.99) and config.optimizer.learning_rate == 1e-4 and config.optimizer.weight_decay == 0.03
    assert config.diffusion.label_drop == 0.15 and config.zero_stage == 1


def test_all_mistakes_are_told_at_once_with_their_paths():
    message = told(training={"steps": 0, "global_bath": 4}, data={"held_out": -1}, optimizer={"betas": [0.9, 1.5]}, modle="vit-tiny")
    assert message.startswith("test.yaml:\n")
    lines = message.splitlines()[1:]
    assert len(lines) == 5
    assert "  training.global_bath: unknown key; did you mean 'global_batch'?" in lines
    assert "  modle: unknown key; did you mean 'model'?" in lines
    for path in ("training.steps: ", "data.held_out: ", "optimizer: betas must lie in [0, 1)"):
        assert any(line.strip().startswith(path) for line in lines), path


def test_a_key_nobody_could_mean_lists_the_known_ones():
    assert "data.zzz: unknown key; known: train, vae, held_out" in told(data={"zzz": 1})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"diffusion": {"weighting": "min-snr"}}, "diffusion.weighting: unknown weighting 'min-snr'; did you mean 'min_snr'?"),
        ({"diffusion": {"weighting": {"name": "min_snr", "gama": 1}}}, "has no parameter 'gama'; did you mean 'gamma'?"),
        ({"diffusion": {"weighting": {"name": "min_snr", "gamma": -1}}}, "diffusion.weighting: "),
        ({"model": {"name": "vit", "width": 100, "heads": 3}}, "model.width 100 is not divisible by model.heads 3"),
        ({"optimizer": {"ema": [{"halflife": 3}]}}, "optimizer.ema.0.halflife: unknown key"),
        ({"training": {"precision": "fp16"}}, "training.precision: "),
        ({"log": {"held_out_every": 5}}, "log.held_out_every needs data.held_out"),
        (
            {"deepspeed": {"train_batch_size": 4}},
            "'train_batch_size' conflicts with the run's config; remove it there and set training.global_batch",
        ),
        ({"deepspeed": {"zero_optimisation": {}}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "zero_optimization.stage must be 0, 1, 2 or 3"),
        ({"deepspeed": "nowhere/zero.json"}, "no file nowhere/zero.json"),
        ({"seed": 2**63}, "seed: "),
        ({"sampling": {"sampler": "heum"}}, "sampling.sampler: unknown sampler 'heum'; did you mean 'heun'?"),
        ({"sampling": {"sampler": {"name": "euler", "steps": 0}}}, "sampling.sampler: sampler 'euler': steps must be at least 1"),
        ({"sampling": {"guidance": {"scale": 2, "beta": 1}}}, "sampling.guidance: guidance has no parameter 'beta'"),
        ({"sampling": {"steps": 18}}, "sampling.steps: unknown key"),
        ({"diffusion": {"schedule": {"name": "cosine", "rescale": 0}}}, "rescale is a ratio of image sizes"),
    ],
)
def test_each_mistake_names_its_key(sections, message):
    assert message in told(**sections)


def test_numbers_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-4, without a dot, as text."""
    config = load(
        tmp_path, MINIMAL + "optimizer: {learning_rate: 1e-4, eps: 1E-8, ema: [{half_life: 1_774_000}]}\n", "optimizer.weight_decay=3e-2"
    )
    assert config.optimizer.learning_rate == 1e-4 and config.optimizer.eps == 1e-8 and config.optimizer.weight_decay == 0.03
    assert config.optimizer.ema[0].half_life == 1_774_000


def test_text_is_no_number(tmp_path):
    with pytest.raises(UserError, match=r"optimizer\.learning_rate.*fast"):
        load(tmp_path, MINIMAL, "optimizer.learning_rate=fast")


def test_overrides_reach_into_sections_and_components(tmp_path):
    config = load(
        tmp_path,
        MINIMAL,
        "training.steps=7",
        "model.depth=3",
        "diffusion.weighting.name=soft_min_snr",
        "diffusion.weighting.gamma=2",
        "data.flip=true",
    )
    assert config.training.steps == 7 and config.data.flip is True
    assert config.model == dataclasses.replace(MODELS.build("vit-tiny"), depth=3)
    assert config.plain()["diffusion"]["weighting"] == {"name": "soft_min_snr", "gamma": 2.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "training.stepz: unknown key; did you mean 'steps'?"),
        ("training", "must read key=value"),
        ("run_dir.x.y=[", "not YAML"),
        ("seed.low=3", "seed is not a section"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        load(tmp_path, MINIMAL + "seed: 1\n", override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not plain YAML"), ("- a", "must hold a mapping"), ("!!python/object/apply:os.getcwd []", "is not plain YAML")],
)
def test_files_that_are_no_config(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the config .*none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_the_resolved_config_reads_back_as_itself():
    config = parse(
        diffusion={"schedule": {"name": "linear", "num_timesteps": 500}, "prediction": "v"},
        optimizer={"ema": [{"half_life": 10, "ramp": None}]},
        sampling={"sampler": {"name": "ddim", "eta": 0.5}, "guidance": {"scale": 2, "interval": [0.2, 0.8]}},
    )
    again = parse_config(yaml.safe_load(yaml.safe_dump(config.plain())), "again")
    assert again == config and again.plain() == config.plain()


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "steps"),
    [(16, None, 1, 1), (16, None, 4, 1), (16, 2, 4, 2), (16, 16, 1, 1), (48, 4, 3, 4)],
)
def test_accumulation_follows_from_the_batches(global_batch, micro_batch, world_size, steps):
    training = TrainingConfig(steps=1, global_batch=global_batch, micro_batch=micro_batch)
    assert training.accumulation_steps(world_size) == steps
    assert steps * training.micro_batch_of(world_size) * world_size == global_batch


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "named"),
    [(None, 3, "multiple of 3"), (3, 1, "training.micro_batch 3"), (16, 2, "training.micro_batch 16")],
)
def test_batches_that_do_not_divide(micro_batch, world_size, named):
    with pytest.raises(UserError, match=r"training\.global_batch 16") as error:
        TrainingConfig(steps=1, global_batch=16, micro_batch=micro_batch).accumulation_steps(world_size)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"ema": []}, "sampling": {"every": 5}}, "give optimizer.ema an average"),
        ({"optimizer": {"ema": []}, "log": {"held_out_every": 5}, "data": {"held_out": 5}}, "give optimizer.ema an average"),
        ({"diffusion": {"label_drop": 0.0}, "sampling": {"every": 5, "guidance": 1.5}}, "needs diffusion.label_drop > 0"),
        ({"sampling": {"every": 5, "guidance": {"controls": 1.375}}}, "sampling.guidance.controls 1.375 needs model.controls and"),
        (
            {"diffusion": {"schedule": "flow", "prediction": "flow"}},
            "a ViT looks timesteps up in a table, and diffusion.schedule flow has real",
        ),
    ],
)
def test_what_would_fail_at_the_first_look_fails_at_once(sections, message):
    with pytest.raises(UserError, match=message):
        parse_config(plain_config("run", "shards", **sections), "test")


@pytest.mark.parametrize(
    ("given", "adaln", "qk_norm"),
    [
        ("auto", "auto", "auto"),
        ("reference", "reference", "reference"),
        ({"adaln": "reference"}, "reference", "auto"),
        ({"default": "reference", "adaln": "triton"}, "triton", "reference"),
    ],
)
def test_kernels_are_chosen_for_all_or_operation_by_operation(given, adaln, qk_norm):
    config = parse(kernels=given)
    assert (config.kernels.of("adaln"), config.kernels.of("qk_norm")) == (adaln, qk_norm)
    assert parse_config(config.plain(), "again").kernels == config.kernels


def test_an_override_of_one_operation_keeps_the_others(tmp_path):
    config = load(tmp_path, MINIMAL + "kernels: reference\n", "kernels.adaln=auto")
    assert config.kernels == Kernels("reference", {"adaln": "auto"})
    assert load(tmp_path, MINIMAL, "kernels.bias_gelu=reference").kernels == Kernels("auto", {"bias_gelu": "reference"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adalm": "reference"}, "kernels: unknown operation 'adalm'; did you mean 'adaln'?"),
        ({"adaln": "cuda"}, "kernels: unknown implementation 'cuda' for adaln; the choices are: auto, triton, reference"),
        ("cuda", "kernels: unknown implementation 'cuda'; the choices are: auto, triton, reference"),
        (["auto"], "kernels: unknown implementation ['auto']"),
    ],
)
def test_unknown_kernels_name_the_nearest(given, message):
    assert message in told(kernels=given)


def test_attention_is_one_of_those_there_are():
    assert set(get_args(RunConfig.model_fields["attention"].annotation)) == set(ATTENTION)
    assert "attention: Input should be 'auto', 'flash', 'cudnn'" in told(attention="flash_attention")


def test_collectives_outlast_what_the_watchdog_allows():
    def seconds(**data: object) -> tuple[float, float]:
        made = parse(training={"timeout_seconds": 40}, data={"retry_seconds": 100, **data})
        return made.patience["data"], made.collective_seconds

    assert seconds() == (0.0, 70.0)
    assert seconds(train="https://host/set") == (100.0, 170.0)
