"""Real runs of the strategies beside the weightings: curriculum, momentum decay, preconditioning and uncertainty, under ZeRO, resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fasttrain.checkpoint import Checkpoints
from fasttrain.cli import main
from fasttrain.cond import Cond
from fasttrain.config import parse_config
from fasttrain.diffusion.curriculum import Curriculum
from fasttrain.diffusion.timestep_weights import Table, placed
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER
from fasttrain.errors import UserError
from fasttrain.lengths import CURRICULUM, MOMENTUM, RATE, filled, lengths
from fasttrain.run import read_run, write_folder
from fasttrain.trained import Trained
from tests.ranks import run_ranks
from tests.runs import GLOBAL_BATCH, plain_config, start, trace, zero

STEPS = 4
SMALL = {"name": "dit", "depth": 1, "width": 16, "heads": 2, "patch": 4}
STRATEGIES: dict[str, Any] = {
    "optimizer": {"momentum_decay": {"floor": 0.2}, "betas": [0.9, 0.99]},
    "diffusion": {
        "schedule": "edm",
        "prediction": "edm",
        "weighting": {"name": "edm", "gamma": 5},
        "timesteps": {"name": "curriculum", "images": 40},
        "uncertainty": True,
    },
}


def strategies(run_dir: Path, digits: Path, stage: int, precision: str = "fp32", **sections: Any) -> dict[str, Any]:
    raw = plain_config(run_dir, digits, deepspeed=zero(stage), training={"precision": precision, "steps": 2 * STEPS}, **STRATEGIES)
    return {**raw, "model": SMALL, **sections}


def _whole_and_resumed(processes: Processes, raw: dict[str, Any], stages: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run of all steps, and one that is saved half way and goes on under another stage."""
    whole = trace(processes, {**raw, "run_dir": f"{raw['run_dir']}-whole"}, 2 * STEPS)
    trace(processes, raw, STEPS, save=True)
    return whole, trace(processes, {**raw, "deepspeed": zero(stages[1])}, STEPS)


@pytest.mark.parametrize("stages", [(3, 1), (2, 2), (0, 3)], ids=str)
def test_all_of_them_train_under_every_zero_stage_and_go_on_from_a_checkpoint(stages: tuple[int, int], tmp_path: Path, digits: Path):
    raw = strategies(tmp_path / "run", digits, stages[0])
    whole, resumed = run_ranks(2, _whole_and_resumed, raw, stages)[0]
    torch.testing.assert_close(resumed["losses"], whole["losses"][STEPS:], rtol=1e-5 if stages[0] != stages[1] else 0, atol=0)
    for key, tensors in whole["state"].items():
        weight = tensors["uncertainty.weight"]
        assert weight.shape == (32,) and weight.abs().max() > 0, key
        torch.testing.assert_close(resumed["state"][key]["uncertainty.weight"], weight, rtol=1e-4, atol=1e-7)


def test_stages_and_numbers_of_ranks_agree(tmp_path: Path, digits: Path):
    found = [
        run_ranks(ranks, trace, strategies(tmp_path / f"{ranks}-{stage}", digits, stage), STEPS)[0] for ranks, stage in ((1, 0), (2, 3))
    ]
    torch.testing.assert_close(found[1]["losses"], found[0]["losses"], rtol=1e-5, atol=0)


def _learned(processes: Processes, raw: dict[str, Any]) -> tuple[list[float], list[tuple[float, float]], float]:
    trainer = start(processes, raw)
    losses = [trainer.optimizer.learning_rate]
    for _ in range(STEPS):
        trainer.train_step()
        losses.append(trainer.optimizer.learning_rate)
    groups = [(group["lr"], group["betas"][0]) for group in trainer.optimizer.param_groups]
    images = trainer.config.diffusion.timesteps.images
    trainer.loader.close()
    return losses, groups, images


def test_open_lengths_are_those_of_the_run_and_the_rate_told_is_the_one_taken(tmp_path: Path, digits: Path):
    raw = strategies(tmp_path / "run", digits, 1)
    raw["diffusion"] = {**raw["diffusion"], "timesteps": "curriculum"}
    rates, groups, images = run_ranks(1, _learned, raw)[0]
    assert images == round(0.2 * 2 * STEPS * GLOBAL_BATCH)
    left = [1 - k / (2 * STEPS) for k in range(STEPS)]
    betas = [max(0.2, 0.9 * r / (0.1 + 0.9 * r)) for r in left]
    assert rates[1:] == pytest.approx([1e-3 * 0.1 / (1 - beta) for beta in betas])
    assert groups == [pytest.approx((rates[-1], betas[-1]))] * 2, "the network's weights, and the uncertainty's"


def _decayed(processes: Processes, raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights after a step at which all masters were 1."""
    trainer = start(processes, raw)
    for fragment in trainer.state.fragments:
        fragment.state[MASTER].fill_(1.0)
    trainer.state.refresh_weights()
    trainer.train_step()
    trainer.loader.close()
    return trainer.state.full(MASTER)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_weights_decay_and_a_learned_uncertainty_does_not(ranks: int, stage: int, tmp_path: Path, digits: Path):
    """A step is at most the learning rate, and at 0.001 x 500 half of a weight decays."""
    raw = strategies(tmp_path / "run", digits, stage)
    raw["optimizer"] = {**raw["optimizer"], "learning_rate": 1e-3, "weight_decay": 500}
    weights = run_ranks(ranks, _decayed, raw)[0]
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, torch.full_like(weight, 1.0 if name == "uncertainty.weight" else 0.5), rtol=0, atol=1.1e-3, msg=name
        )


def _planned(processes: Processes, raw: dict[str, Any]) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """The lengths that a start goes by, what it says of them, and those that its own checkpoint then holds."""
    trainer = start(processes, raw)
    trainer.train_step()
    trainer.save()
    trainer.saver.finish()
    trainer.loader.close()
    found = Checkpoints(trainer.config.run_dir, processes).newest()
    assert found is not None and trainer.objective.timesteps.images == lengths(trainer.config)[CURRICULUM]
    return lengths(trainer.config), trainer._kept, found[1].lengths


def test_a_run_made_longer_goes_on_as_planned_unless_lengths_are_given(tmp_path: Path, digits: Path):
    raw = strategies(tmp_path / "run", digits, 1)
    raw["diffusion"] = {**raw["diffusion"], "timesteps": "curriculum"}
    first = {CURRICULUM: round(0.2 * 2 * STEPS * GLOBAL_BATCH), MOMENTUM: 2 * STEPS}
    assert run_ranks(1, _planned, raw)[0] == (first, [], first)
    saved = tmp_path / "run" / "checkpoints" / "step-00000001"
    saved.rename(saved.with_suffix(".tmp"))  # as a first save that was cut off just before its rename leaves it
    longer = {**raw, "training": {**raw["training"], "steps": 5 * STEPS}}
    for found, told, kept in run_ranks(2, _planned, longer):
        assert found == kept == first and len(told) == 2
        assert f"{MOMENTUM} stays {2 * STEPS}, as planned when the run began; for {5 * STEPS}" in told[1]
    given = {**longer, "optimizer": {**raw["optimizer"], "momentum_decay": {"floor": 0.2, "steps": 11}}}
    found, told, kept = run_ranks(1, _planned, given)[0]
    assert found == kept == {**first, MOMENTUM: 11} and len(told) == 1


def test_the_control_arm_s_length_is_kept_as_well(tmp_path: Path, digits: Path):
    config = parse_config(plain_config(tmp_path, digits, optimizer={"decay": "demon"}), "test")
    assert lengths(filled(config, {})) == {RATE: 20} and lengths(filled(config, {RATE: 7, MOMENTUM: 3})) == {RATE: 7}


def _run_to_sample(processes: Processes, raw: dict[str, Any]) -> None:
    trainer = start(processes, raw)
    write_folder(trainer.config, trainer.index, processes)
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    trainer.saver.finish()
    trainer.loader.close()


def test_a_trained_network_predicts_without_its_uncertainty_which_is_not_exported(tmp_path: Path, digits: Path):
    raw = strategies(tmp_path / "run", digits, 1)
    run_ranks(1, _run_to_sample, raw)
    trained = Trained.load(tmp_path / "run", "ema", torch.device("cpu"))
    out = trained.network(torch.zeros(2, *trained.index.x0_shape), torch.tensor([1.0, 2.0]), Cond(torch.tensor([0, 1])))
    assert isinstance(out, torch.Tensor) and out.shape[0] == 2
    assert trained.network.get_parameter("uncertainty.weight").abs().max() > 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model.safetensors")]) == 0
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "blocks.0.attn.qkv.weight" in file.keys() and not any("uncertainty" in name for name in file.keys())  # noqa: SIM118
        assert json.loads(file.metadata()["config"])["diffusion"]["uncertainty"] is True
    config, _ = read_run(tmp_path / "run")
    assert isinstance(config.diffusion.timesteps, Curriculum) and config.optimizer.momentum_decay is not None
    assert config.optimizer.momentum_decay.steps == 2 * STEPS
    without = {**raw, "diffusion": {**raw["diffusion"], "uncertainty": False}}
    with pytest.raises(Exception, match=r"was trained with diffusion\.uncertainty True, this config says"):
        run_ranks(1, trace, without, 1)


def test_a_vit_refuses_edm_s_real_timesteps(tmp_path: Path, digits: Path):
    raw = plain_config(tmp_path / "run", digits, diffusion={"schedule": "edm"})
    with pytest.raises(UserError, match=r"diffusion\.schedule edm has real ones: take a dit or an mmdit"):
        parse_config(raw, "test")


def _looked(processes: Processes, raw: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """The losses that a report tells of two steps, those without the uncertainty, and those that were minimised."""
    trainer = start(processes, raw)
    with torch.no_grad():  # as after long training: u far below 0
        trainer.network.get_parameter("uncertainty.weight")[0] = -1.0
    minimised, weighted = [], []
    objective = trainer.objective

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = objective(*args, **kwargs)
        minimised.append(float(loss.loss.detach()))
        weighted.append(float(loss.weighted.mean()))
        return loss

    trainer.objective = watched  # type: ignore[assignment]
    for _ in range(2):
        trainer.train_step()
    trainer.loader.close()
    return trainer.meters.reduce()["losses"], weighted, minimised


def test_losses_are_told_without_the_uncertainty(tmp_path: Path, digits: Path):
    """The minimised one, e^-u L + u, is negative for a small L and its u: no spike could be found in its logarithm."""
    told, weighted, minimised = run_ranks(1, _looked, strategies(tmp_path / "run", digits, 1))[0]
    assert told == pytest.approx(weighted) and abs(minimised[0] / weighted[0] - 1) > 0.1


def _held_out(processes: Processes, raw: dict[str, Any]) -> list[float]:
    """The held-out loss under the weights in effect, and under others."""
    trainer = start(processes, raw)
    trainer.train_step()
    told: list[dict[str, Any]] = []
    reporter = type("Reporter", (), {"say": lambda *_: None, "write": lambda _, record: told.append(record)})()
    for weighting in (trainer.objective.weighting, placed(Table((0.0, 0.0, 9.0)), trainer.config.diffusion.schedule)):
        trainer.objective.weighting = weighting
        trainer._look(reporter, held_out=True, grid=False)
    trainer.loader.close()
    return [record["held_out_loss"] for record in told]


def test_the_held_out_loss_is_weighted_as_the_run_s_is_now(tmp_path: Path, digits: Path):
    pareto = {"name": "pareto", "ranges": 3, "every": 3, "samples": 8}
    raw = plain_config(tmp_path / "run", digits, diffusion={"weighting": pareto}, data={"held_out": 16})
    now, others = run_ranks(1, _held_out, {**raw, "log": {**raw["log"], "held_out_every": 1}})[0]
    assert others > 2 * now
