"""Runs that begin from others: the real commands and real training states, under every ZeRO stage."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fasttrain.building import build_network, build_objective
from fasttrain.checkpoint import newest_sound, read_weights
from fasttrain.cond import Cond, Text
from fasttrain.config import load_config, parse_config
from fasttrain.data.loader import training_loader
from fasttrain.data.shards import ShardSet
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.run import read_run
from fasttrain.trained import Trained
from fasttrain.transfer import told_at_resume
from tests.commands import fasttrain
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero
from tests.test_bad_input import assert_one_message, contents, write_config
from tests.told_images import PLACES, POOLED, SIDE, WIDTH, write_told

STEPS = 6
CPU = torch.device("cpu")
DIT: dict[str, Any] = {"name": "dit", "depth": 2, "width": 32, "heads": 2, "patch": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of a few steps, to begin from: its averages are not its weights."""
    folder = tmp_path_factory.mktemp("base")
    done = fasttrain(
        "train", write_config(folder, digits, training={"steps": STEPS}, optimizer={"ema": [{"half_life": 500}, {"half_life": 20}]})
    )
    assert done.status == 0, done.err
    return folder / "run"


def weights(run: Path, key: str) -> dict[str, torch.Tensor]:
    folder, manifest, _ = newest_sound(run)
    return read_weights(folder, manifest, key)


def started(processes: Processes, raw: dict[str, Any]) -> dict[str, Any]:
    """The state that a run begins with, what its model computes with where a rank holds that whole, and the first batch's loss."""
    trainer = start(processes, raw)
    state: dict[str, Any] = {key: trainer.state.full(key) for key in trainer.state.keys}
    if trainer.config.zero_stage < 3:
        state["computed"] = {name: p.detach().float().clone() for name, p in trainer.network.named_parameters() if p.requires_grad}
    batch = next(trainer.batches)
    with torch.no_grad():
        state["loss"] = float(trainer.objective(trainer.engine, batch.clean, batch.cond, batch.position, dtype=trainer.dtype).loss)
    trainer.loader.close()
    trainer.engine.destroy()
    return state


@pytest.mark.parametrize(("stage", "ranks", "precision"), [(0, 1, "bf16"), (1, 2, "fp32"), (2, 2, "bf16"), (3, 2, "fp32")])
def test_masters_averages_and_weights_begin_from_the_source(
    tmp_path: Path, digits: Path, base: Path, expected_loss: dict[str, float], stage: int, ranks: int, precision: str
):
    raw = plain_config(tmp_path / "run", digits, deepspeed=zero(stage), training={"precision": precision}, init_from=str(base))
    states = run_ranks(ranks, started, raw)
    wanted = weights(base, "ema")
    for key in ("master", "ema"):
        assert all(torch.equal(states[0][key][name], weight) for name, weight in wanted.items()), key
    assert all(not moment.any() for key in ("exp_avg", "exp_avg_sq") for moment in states[0][key].values())
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    for state in states if stage < 3 else []:
        assert all(torch.equal(state["computed"][name], weight.to(kind).float()) for name, weight in wanted.items())
    loss = sum(state["loss"] for state in states) / ranks  # every rank computes with them, also where none holds them whole
    assert loss == pytest.approx(expected_loss["taken"], rel=1e-2 if precision == "bf16" else 1e-5)
    assert loss != pytest.approx(expected_loss["random"], rel=5e-2)


@pytest.fixture(scope="module")
def expected_loss(tmp_path_factory: pytest.TempPathFactory, digits: Path, base: Path) -> dict[str, float]:
    """Of the first batch, by the source's averages and by random weights, computed without any of the code above."""
    config, _ = read_run(base)
    set_, seed = ShardSet.open(str(digits), config.data), torch.tensor(config.seed)
    objective = build_objective(config, seed)
    network = build_network(config)
    losses = {}
    with training_loader(config.data, set_, seed) as loader:
        batch = next(loader.batches(0, 16, 0, 1))
    for name in ("random", "taken"):
        if name == "taken":
            network.load_state_dict(weights(base, "ema"), strict=False)
        with torch.no_grad():
            losses[name] = float(objective(network, batch.clean, batch.cond, batch.position, dtype=torch.float32).loss)
    return losses


def test_a_run_begins_where_another_ended_tells_it_and_goes_on_from_its_own(tmp_path: Path, digits: Path, base: Path):
    config = write_config(
        tmp_path, digits, training={"steps": 3}, init_from={"source": str(base), "weights": "ema_1"}, model={"num_classes": 12}
    )
    dry = fasttrain("train", config, "--dry-run")
    assert dry.status == 0 and "10 classes there, 12 here" in dry.out and not (tmp_path / "run").exists(), dry
    done = fasttrain("train", config)
    assert done.status == 0, done.err
    for line in (
        f"init_from: the run {base}, ema_1 weights of step {STEPS} (fasttrain names)",
        "taken",
        "blocks.*.attn.qkv.weight x 2",
        "starting in",
    ):
        assert line in done.out, line
    record = json.loads((tmp_path / "run" / "init.json").read_text())
    assert record["init_from"] == {"source": str(base), "weights": "ema_1", "positions": "resample", "patch": None}
    rows = {row["parameter"]: row for row in record["parameters"]}
    assert rows["class_embedding.weight"] == {
        "parameter": "class_embedding.weight",
        "how": "fresh",
        "shape": [13, 32],
        "from": None,
        "why": "10 classes there, 12 here",
    }
    assert rows["blocks.1.mlp.fc1.weight"]["how"] == "taken" and len(rows) == len(weights(tmp_path / "run", "master"))
    before = {name: weight.clone() for name, weight in weights(tmp_path / "run", "master").items()}

    again = fasttrain("train", config, "training.steps=4", f"init_from.source={tmp_path / 'gone'}")
    assert again.status == 0 and "continuing from step-00000003" in again.out, again
    assert (
        f"this run began from the run {base}, ema_1 weights of step {STEPS}" in again.out
        and "init_from is another now, and is not used" in again.out
    )
    assert not torch.equal(weights(tmp_path / "run", "master")["pos_embed"], before["pos_embed"])


def test_a_run_that_began_without_it_says_so(tmp_path: Path, digits: Path):
    plain = parse_config(plain_config(tmp_path, digits), "test")
    asked = parse_config(plain_config(tmp_path, digits, init_from="elsewhere"), "test")
    assert told_at_resume(plain) is None
    assert told_at_resume(asked) == "init_from elsewhere is not used: this run began without it"
    (tmp_path / "init.json").write_text("{")
    assert "cannot be read" in (told_at_resume(asked) or "")


def test_a_step_taken_again_from_the_beginning_begins_there_too(tmp_path: Path, digits: Path, base: Path):
    config = write_config(tmp_path, digits, training={"steps": 3}, init_from=str(base))
    assert fasttrain("train", config).status == 0
    done = fasttrain("replay", tmp_path / "run", "2")
    assert done.status == 0, done.err
    recorded = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["loss"]
    report = json.loads(next((tmp_path / "run" / "replays").glob("*.json")).read_text())
    assert report["loss"] == pytest.approx(recorded, rel=1e-6)
    untrained = Trained.load(tmp_path / "run", "untrained", CPU).network
    assert torch.equal(untrained.pos_embed, weights(base, "ema")["pos_embed"])


def test_an_export_begins_a_run(tmp_path: Path, digits: Path, base: Path):
    assert fasttrain("export", base, tmp_path / "base.safetensors").status == 0
    config = write_config(tmp_path, digits, training={"steps": 1}, init_from=str(tmp_path / "base.safetensors"))
    done = fasttrain("train", config)
    assert done.status == 0 and "ema of 500 images weights of step 6 (fasttrain names)" in done.out and "note:" not in done.out, done
    started_from = Trained.load(tmp_path / "run", "untrained", CPU).network
    assert torch.equal(started_from.pos_embed, weights(base, "ema")["pos_embed"])


def test_an_official_checkpoint_continues_training_and_goes_to_diffusers(tmp_path: Path, digits: Path):
    """With DiT's public names, learned sigma and position table; then through diffusers and back, bit for bit."""
    from diffusers import DiTTransformer2DModel

    source = write_config(tmp_path / "source", digits, model={**DIT, "learn_sigma": True, "num_timesteps": None}, training={"steps": 2})
    assert fasttrain("train", source).status == 0
    network = Trained.load(tmp_path / "source" / "run", "raw", CPU).network
    save_file(dict(network.state_dict()), tmp_path / "official.safetensors")
    config = write_config(
        tmp_path,
        digits,
        model={**DIT, "learn_sigma": True, "num_timesteps": None},
        training={"steps": 2},
        init_from=str(tmp_path / "official.safetensors"),
    )
    done = fasttrain("train", config)
    assert done.status == 0 and "official DiT (facebookresearch/DiT) names" in done.out and "left out  pos_embed" in done.out, done

    exported = fasttrain("export", tmp_path / "run", tmp_path / "folder", "--format", "diffusers", "--weights", "raw")
    assert exported.status == 0 and "downscale_freq_shift = 0" in exported.out, exported
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "folder")
    assert theirs.config.num_embeds_ada_norm == 10 and theirs.config.out_channels == 2
    back = write_config(
        tmp_path / "back",
        digits,
        model={**DIT, "learn_sigma": True, "num_timesteps": None},
        training={"steps": 1},
        init_from=str(tmp_path / "folder"),
    )
    done = fasttrain("train", back)
    assert (
        done.status == 0
        and "diffusers' DiTTransformer2DModel names" in done.out
        and "model.frequency_shift is 1 there and 0 here" in done.out
    ), done
    begun = dict(Trained.load(tmp_path / "back" / "run", "untrained", CPU).network.named_parameters())
    assert all(torch.equal(begun[name], weight) for name, weight in weights(tmp_path / "run", "master").items())
    facts = json.loads((tmp_path / "folder" / "fasttrain.json").read_text())
    assert facts["step"] == 2 and facts["config"]["diffusion"]["prediction"] == {"name": "x0"}


def test_a_run_of_text_goes_to_diffusers_and_back(tmp_path: Path):
    """What SD3Transformer2DModel computes of it is what it computes; a run that begins from that folder has its weights bit for bit."""
    from diffusers import SD3Transformer2DModel

    model = {"name": "mmdit", "form": "dual", "depth": 2, "width": 32, "heads": 2, "patch": 4, "num_timesteps": None}
    config = write_config(tmp_path, write_told(tmp_path), model=model, training={"steps": 2}, optimizer={"learning_rate": 0.03})
    assert fasttrain("train", config).status == 0
    exported = fasttrain("export", tmp_path / "run", tmp_path / "folder", "--format", "diffusers", "--weights", "raw")
    assert exported.status == 0, exported.err
    theirs, ours = SD3Transformer2DModel.from_pretrained(tmp_path / "folder"), Trained.load(tmp_path / "run", "raw", CPU).network
    text = Text(torch.randn(3, PLACES, WIDTH), torch.full((3,), PLACES), torch.randn(3, POOLED))
    x, t = torch.randn(3, 3, SIDE, SIDE), torch.tensor([0, 400, 999])
    with torch.no_grad():
        wanted = ours(x, t, Cond(text=text))
        made = theirs(x, encoder_hidden_states=text.tokens, pooled_projections=text.pooled, timestep=t).sample
    torch.testing.assert_close(made, wanted, rtol=0, atol=2e-6)
    assert wanted.std() > 0.01

    done = fasttrain("train", config, f"run_dir={tmp_path / 'back'}", f"init_from={tmp_path / 'folder'}", "training.steps=1")
    assert done.status == 0 and "diffusers' SD3Transformer2DModel names" in done.out and "fresh" not in done.out, done
    begun = dict(Trained.load(tmp_path / "back", "untrained", CPU).network.named_parameters())
    assert all(torch.equal(begun[name], weight) for name, weight in weights(tmp_path / "run", "master").items())


def test_what_diffusers_has_no_class_for_is_refused(tmp_path: Path, base: Path):
    assert_one_message(
        fasttrain("export", base, tmp_path / "folder", "--format", "diffusers"), "--format diffusers", "no class for the model vit"
    )
    assert not (tmp_path / "folder").exists()


def test_ranks_that_read_different_weights_are_told(tmp_path: Path, digits: Path, base: Path):
    """Hosts whose copies of a file differ: here, ranks that stand in different folders."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for scale, folder in enumerate(folders, start=1):
        folder.mkdir()
        save_file({name: weight * scale for name, weight in weights(base, "master").items()}, folder / "vit.safetensors")
    told = run_ranks(2, refused_in, folders, plain_config(tmp_path / "run", digits, init_from="vit.safetensors"))
    assert told == ["init_from: ranks read different weights from vit.safetensors: give every host the same"] * 2


def refused_in(processes: Processes, folders: list[Path], raw: dict[str, Any]) -> str:
    os.chdir(folders[processes.rank])
    with pytest.raises(UserError) as refused:
        start(processes, raw)
    return str(refused.value)


@pytest.mark.parametrize(
    ("given", "sections", "named"),
    [
        ("nowhere", {}, ["no such folder or file"]),
        ("base", {"model": {"depth": 3}}, ["model.depth is 2", "3 here", "set model.depth=2"]),
        ("base", {"model": {**DIT, "num_timesteps": None}}, ["model.name is 'vit'", "'dit' here"]),
        ("base", {"model": {"patch": 4}}, ["model.patch is 2", "init_from.patch"]),
        ("unstarted", {}, ["has no checkpoint yet"]),
        ("damaged", {}, ["can be trusted", "does not match its digest"]),
        ("own", {}, ["init_from names this run's own run_dir"]),
        ("cut.safetensors", {}, ["no sound safetensors file"]),
        ("dit.pt", {}, ["is a pickle", "python -c"]),
        ("nan.safetensors", {}, ["pos_embed that is not finite"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_begun_from(tmp_path: Path, digits: Path, base: Path, given: str, sections: dict[str, Any], named: list[str]):
    place = {"base": base, "own": tmp_path / "work" / "run"}.get(given, tmp_path / given)
    _make(tmp_path, base, given)
    config = write_config(tmp_path / "work", digits, init_from=str(place), **sections)
    if given == "base":  # both plan alike
        assert_one_message(fasttrain("train", config, "--dry-run"), *named)
    assert_one_message(fasttrain("train", config), *named)
    if given != "nan.safetensors":  # which only reading all of it shows
        assert list((tmp_path / "work").iterdir()) == [config], "nothing was begun"
    assert not (tmp_path / "work" / "run" / "checkpoints").exists()


def _make(folder: Path, base: Path, given: str) -> None:
    """The places that such configs name."""
    if given == "unstarted":
        shutil.copytree(base, folder / given, ignore=shutil.ignore_patterns("step-*"))
    if given == "damaged":
        shutil.copytree(base, folder / given)
        for path in (folder / given).rglob("rank-00000.safetensors"):
            content = bytearray(path.read_bytes())
            content[-50] ^= 1
            path.write_bytes(content)
    if given == "cut.safetensors":
        (folder / given).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    if given == "dit.pt":
        torch.save({"a": torch.ones(1)}, folder / given)
    if given == "nan.safetensors":
        tensors = weights(base, "master")
        tensors["pos_embed"][0, 3, 5] = float("nan")
        save_file(tensors, folder / given)


def test_an_unknown_choice_of_weights_names_those_there_are(tmp_path: Path, digits: Path, base: Path):
    before = contents(base)
    for wanted in ("ema_2", "exp_avg", "master"):
        config = write_config(tmp_path, digits, init_from={"source": str(base), "weights": wanted})
        assert_one_message(fasttrain("train", config), f"init_from.weights {wanted}", "has raw, ema, ema_1")
    config = write_config(tmp_path, digits, init_from={"source": str(base), "wieghts": "ema"})
    assert_one_message(fasttrain("train", config), "init_from.wieghts: unknown key; did you mean 'weights'?")
    assert contents(base) == before


def test_a_source_alone_takes_overrides(tmp_path: Path, digits: Path):
    config = load_config(write_config(tmp_path, digits, init_from="there"), ["init_from.positions=fresh"])
    assert config.plain()["init_from"] == {"source": "there", "weights": None, "positions": "fresh", "patch": None}
    assert parse_config(config.plain(), "again") == config
