"""The benchmarks themselves run, at tiny sizes on the CPU, and leave what the README's tables read."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels.cases import CASES
from fasttrain_kernels.dispatch import OPERATIONS

from benchmarks import kernels, optimizer_pass, tables, train_step
from benchmarks.networks import config_of
from benchmarks.stage import NO_TIME, Stage
from benchmarks.step_arms import ARMS
from benchmarks.updates import TrainingState
from fasttrain.models.ragged import Packed

CPU = torch.device("cpu")
EFFORT = train_step.Effort(rounds=2, steps=2, arms=(), backend="aot_eager", geometry=tuple(train_step.SMOKE_GEOMETRY.items()))
CEILINGS = {"matmul": {"best": 1e12, "datasheet": None}}


def test_operations_are_measured_in_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ["adaln", "weighted_mse", "uniform", "adamw_ema"]
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu", "--smoke", "--out", str(tmp_path), "--operations", *some])
    assert kernels.main() == 0
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert {case["case"]["operation"] for case in result["cases"]} == set(some)
    for case in result["cases"]:
        assert not case["refused"]
        assert case["case"]["operation"] == "adamw_ema" or "forward compile over ours" in case["told"]
        assert {"eager", "ours"} <= set(case["arms"])
        assert all(arm["host_seconds"] > 0 for arm in case["arms"].values())
    assert "of a copy" in "\n".join(tables._kernels("cpu", result))


def test_the_plan_holds_every_operation_at_every_size_and_the_digest_the_most_telling() -> None:
    full, digest = ([point.keys() for point in kernels.points(kernels.Effort(5, 10, short, False), CPU)] for short in (False, True))
    planned = {(point["operation"], *point["sample"]) for point in full}
    assert {operation for operation, *_ in planned} == set(OPERATIONS) - set(optimizer_pass.OPERATIONS)
    for operation in ("adaln", "gated_adaln", "residual_norm"):
        sizes = itertools.product((256, 258, 1024), (768, 1024, 1152, 1536))
        assert {(operation, *size) for size in sizes} <= planned
    assert {point["operation"] for point in digest} == {point["operation"] for point in full}
    assert [256, 1152] in [point["sample"] for point in digest] and len(digest) == len(CASES) - len(optimizer_pass.OPERATIONS)
    assert full[0]["operation"] == "gated_adaln" and full[0]["sample"] == [256, 1152]


def test_a_wrong_optimizer_has_no_speed() -> None:
    def without_correction(buffers: optimizer_pass.Buffers) -> None:
        for p, g in zip(buffers.params, buffers.grads, strict=True):
            p.sub_(optimizer_pass.LR * g.float())

    assert optimizer_pass.fault(optimizer_pass.ours, [33, 64], CPU) is None
    assert optimizer_pass.fault(optimizer_pass.fused, [33, 64], CPU) is None
    assert "the new state is off by" in (optimizer_pass.fault(without_correction, [33, 64], CPU) or "")


@pytest.mark.parametrize(("preset", "baseline"), [("dit-tiny", "compile"), ("vit-tiny", "tuned eager")])
def test_a_race(preset: str, baseline: str) -> None:
    race = train_step.Race(preset, 2, EFFORT, CPU, CEILINGS, lambda: 600.0)
    found = race.run(tuple(ARMS[name] for name in ("eager", baseline, "ours, kernels only", "ours")))
    assert found["refused"] == {"ours": "ValueError: CUDA graphs need a CUDA device"}
    assert set(found["arms"]) == {"eager", baseline, "ours, kernels only"}
    assert found["best_of_ours"] == "ours, kernels only" and set(found["over_ours"]) == {"eager", baseline}
    for arm in found["arms"].values():
        assert arm["step"]["seconds"]["count"] == 4 and arm["images_per_second"] > 0
    result: dict[str, Any] = {"environment": {"torch": "2"}, "settings": {}, "cases": [{"case": _name(preset), **found}]}
    assert f"| {preset}, batch 2 | ours | " in "\n".join(tables._step("cpu", result))
    looked = race.look("ours, kernels only")
    assert looked["profile"]["microseconds"]["GEMM"] > 0 and looked["host_waits"]["per_step"] is None


def test_captions_race_masked_and_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    race = train_step.Race("mmdit-tiny+captions", 3, EFFORT, CPU, CEILINGS, lambda: 600.0)
    both = tuple(ARMS[name] for name in train_step.CAPTION_ARMS)
    found = race.run(both)
    assert found["refused"] == {} and set(found["arms"]) == {"ours, masked", "ours, packed"} and len(found["over_ours"]) == 1
    monkeypatch.setattr(Packed, "where", lambda self, length, text, image: torch.arange(4, dtype=torch.int32) * (text + image))
    assert "ours, packed" in race.run(both)["refused"], "attention that sees the padding has a speed"


def test_only_a_model_that_takes_captions_has_their_arms() -> None:
    effort = replace(EFFORT, arms=tuple(ARMS))
    names = {model: {spec.name for spec in train_step._specs(config_of(model), effort)} for model in ("dit-tiny", "mmdit-tiny+captions")}
    assert names["mmdit-tiny+captions"] == set(ARMS) == names["dit-tiny"] | set(train_step.CAPTION_ARMS)
    assert names["dit-tiny"] != set(ARMS)


def _name(preset: str) -> dict[str, Any]:
    return {"part": "arms", "model": preset, "batch": 2}


def test_an_arm_with_wrong_gradients_does_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    race = train_step.Race("dit-tiny", 2, EFFORT, CPU, CEILINGS, lambda: 600.0)
    honest = train_step.StepArm.model

    def frozen(arm: train_step.StepArm, *inputs: torch.Tensor) -> torch.Tensor:
        value = honest(arm, *inputs)
        return value * 0.9 + 0.1 * value.detach() if arm.spec.name == "eager" else value

    monkeypatch.setattr(train_step.StepArm, "model", frozen)
    found = race.run((ARMS["eager"], ARMS["ours, kernels only"]))
    assert "the gradient of" in found["refused"]["eager"] and set(found["arms"]) == {"ours, kernels only"}


def test_an_arm_that_fails_in_its_turn_leaves_the_others_in_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    race = train_step.Race("dit-tiny", 2, EFFORT, CPU, CEILINGS, lambda: 600.0)
    honest = train_step.StepArm.begin

    def begin(arm: train_step.StepArm) -> None:
        if arm.spec.name == "ours, kernels only":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        honest(arm)

    monkeypatch.setattr(train_step.StepArm, "begin", begin)
    kept: list[dict[str, Any]] = []
    found = race.run((ARMS["ours, kernels only"], ARMS["tuned eager"]), kept.append)
    assert "when stream is capturing" in found["refused"]["ours, kernels only"]
    assert set(found["arms"]) == {"tuned eager"} and found["rounds"] == 2
    assert found["told"].startswith("tuned eager ") and "; ours, kernels only refused: RuntimeError: CUDA error" in found["told"]
    assert [one["rounds"] for one in kept] == [1, 2] and set(kept[0]["arms"]) == {"tuned eager"}


def test_every_model_races_before_one_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path / "step.json", "step", {"device": "cpu"}, {}, 60.0)
    done: list[tuple[str, str]] = []

    def case(measure: Any, *, least: float | None = None, **keys: Any) -> dict[str, Any]:
        done.append((keys["part"], keys.get("model", "")))
        return {"matmul": {}} if keys["part"] == "limits" else {}

    monkeypatch.setattr(stage, "case", case)
    train_step.run(stage, ["dit-tiny", "vit-tiny"], EFFORT, CPU, full=False, digest=False, batch=2)
    races = [model for part, model in done[:4] if part == "arms"]
    assert races == ["dit-tiny", "vit-tiny"] and {part for part, _ in done[4:]} == {"profile", "ablation", "deepspeed's processes"}


def test_when_time_is_short_there_are_fewer_arms_and_rounds() -> None:
    left = iter([100.0, 100.0, 10.0])  # an arm is built, another, and no more
    clock = itertools.chain(left, itertools.cycle([100.0, 100.0, 70.0]), itertools.repeat(0.0))
    race = train_step.Race("dit-tiny", 2, EFFORT, CPU, CEILINGS, lambda: next(clock))
    found = race.run(tuple(ARMS[name] for name in ("ours, kernels only", "tuned eager", "eager")))
    assert found["refused"] == {"eager": NO_TIME} and set(found["arms"]) == {"ours, kernels only", "tuned eager"}


def test_one_kernel_off_is_another_arm() -> None:
    spec = train_step.without(ARMS["ours"], "bias_gelu")
    assert spec.kernels.of("bias_gelu") == "reference" and spec.kernels.of("noising") == "auto"
    assert spec.name == "ours without bias_gelu" and spec.update is ARMS["ours"].update
    assert train_step.without(ARMS["ours"], "adamw_ema").update is ARMS["compile"].update
    assert {operation for kind in train_step.ABLATED.values() for operation in kind} <= set(OPERATIONS)


def test_arms_share_one_state() -> None:
    race = train_step.Race("dit-tiny", 2, EFFORT, CPU, CEILINGS, lambda: 600.0)
    wide, narrow = (race._built(ARMS[name]) for name in ("eager", "tuned eager"))
    before = [m.clone() for m in race.state.masters]
    for arm in (wide, narrow):
        arm.begin()
        arm.step()
        arm.end()
    assert any(not torch.equal(m, old) for m, old in zip(race.state.masters, before, strict=True))
    assert wide.network.final_layer.linear.weight.data_ptr() == race.state.wide["final_layer.linear.weight"].data_ptr()
    race.state.settle()
    for name, master in zip(race.state.trained, race.state.masters, strict=True):
        assert torch.equal(master, race.state.weights[name].float())


@pytest.mark.parametrize("name", ["eager", "tuned eager", "ours, kernels only"])
def test_every_update_is_the_same_step(name: str) -> None:
    """One step from the same state and gradients: the three updates differ in rounding only."""
    torch.manual_seed(0)
    states = [TrainingState.of(torch.nn.Linear(40, 30, dtype=torch.float32)) for _ in range(2)]
    for mine, theirs in zip(states[1].masters, states[0].masters, strict=True):
        mine.copy_(theirs)
    states[1].emas = [m.clone() for m in states[1].masters]
    states[0].emas = [m.clone() for m in states[0].masters]
    grads = [torch.randn_like(m).bfloat16().float() for m in states[0].masters]
    ARMS["tuned eager"].update(states[0], [g.bfloat16() for g in grads])
    spec = replace(ARMS[name])
    spec.update(states[1], grads if spec.autocast else [g.bfloat16() for g in grads])
    for kind in ("masters", "exp_avgs", "exp_avg_sqs", "emas"):
        for mine, theirs in zip(getattr(states[1], kind), getattr(states[0], kind), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
