"""A step whose loss or gradient is not finite on any rank changes nothing on all, is written down, and too many in a row end the run."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.cond import Cond
from fasttrain.engine.distributed import Processes
from fasttrain.errors import DivergedError, Status
from fasttrain.lines import records
from fasttrain.skipping import Skips, with_its_gradient
from tests.commands import fasttrain
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero

STEPS, BAD = 40, 20
KINDS = ("loss", "overflow", "gradient")


def test_a_finite_loss_keeps_its_bits_and_another_gets_a_gradient_that_is_not_finite():
    for value in (0.15625, 2.0**127, math.inf, math.nan):
        x = torch.tensor(value, requires_grad=True)
        loss = with_its_gradient(x)
        loss.backward()
        assert x.grad is not None
        assert (loss.item(), x.grad.item()) == (value, 1.0) if math.isfinite(value) else not math.isfinite(x.grad)


class _Exploding(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.inf


@dataclass(frozen=True)
class Plan:
    """Which steps go wrong: for each, the rank, the micro-batch, and what is not finite."""

    bad: dict[int, tuple[int, int, str]]

    @classmethod
    def drawn(cls, seed: int, world_size: int, accumulation: int) -> "Plan":
        draw, steps = random.Random(seed), random.Random(0).sample(range(1, STEPS + 1), BAD)
        return cls({step: (draw.randrange(world_size), draw.randrange(accumulation), draw.choice(KINDS)) for step in steps})


class Planted:
    """Around the objective: makes what the plan says go wrong."""

    def __init__(self, trainer: Any, plan: Plan):
        self._trainer, self._plan, self._objective, self._calls = trainer, plan, trainer.objective, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._objective(*args, **kwargs)
        call, self._calls = self._calls, self._calls + 1
        step, micro = self._trainer.progress.step + 1, call % self._trainer.accumulation_steps
        rank, when, kind = self._plan.bad.get(step, (None, None, None))
        if (rank, when) != (self._trainer.processes.rank, micro):
            return loss
        spoilt = {
            "loss": lambda x: x * math.nan,
            "overflow": lambda x: x + math.inf,  # whose gradient is finite
            "gradient": _Exploding.apply,
        }[kind]
        return loss._replace(loss=spoilt(loss.loss), weighted=spoilt(loss.weighted))


def _held(trainer: Any) -> list[torch.Tensor]:
    state = [view.clone() for fragment in trainer.state.fragments for view in fragment.state.values()]
    return [*state, *(p.detach().clone() for p in trainer.engine.module.parameters())]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _train(processes: Processes, raw: dict[str, Any], plan: Plan) -> dict[str, Any]:
    trainer = start(processes, raw)
    trainer.objective = Planted(trainer, plan)
    skipped, touched = [], []
    for step in range(1, STEPS + 1):
        before, updates = _held(trainer), trainer.progress.updates
        if not trainer.train_step():
            skipped.append(step)
        if trainer.progress.updates == updates and not _same(before, _held(trainer)):
            touched.append(step)
    state = {key: trainer.state.full(key) for key in trainer.state.keys}
    result = {"skipped": skipped, "touched": touched, "progress": trainer.progress, "losses": trainer.meters.reduce(), "state": state}
    trainer.loader.close()
    trainer.engine.destroy()
    return result


def train_all(processes: Processes, raws: list[dict[str, Any]], plans: list[Plan]) -> list[Any]:
    """What each of these runs skipped, what its skipped steps changed, and its final state."""
    return [_train(processes, raw, plan) for raw, plan in zip(raws, plans, strict=True)]


CASES = [
    (stage, precision, accumulation)
    for stage in (0, 1, 2, 3)
    for precision, accumulation in ((("bf16", "fp32")[stage % 2], 2), (("fp32", "bf16")[stage % 2], 1))
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_bad_step_is_skipped_on_all_ranks_and_changes_nothing(world_size: int, tmp_path: Path, digits: Path):
    """NaN and overflow on one rank at 20 of 40 steps; what happens in a bad micro-batch must not show in later steps.

    `python -m benchmarks.numerical_faults` tries every case.
    """
    cases = CASES[2::4] if world_size == 2 else CASES[1::4]
    raws, plans = [], []
    for stage, precision, accumulation in cases:
        training = {"steps": STEPS, "precision": precision, "micro_batch": 16 // world_size // accumulation, "clip": 1.0}
        raw = plain_config(tmp_path / "run", digits, deepspeed=zero(stage), training=training)
        for seed in (1, 2):  # the same steps go wrong, in other ways
            raws.append(raw)
            plans.append(Plan.drawn(seed, world_size, accumulation))
    per_rank = run_ranks(world_size, train_all, raws, plans)
    for i, plan in enumerate(plans):
        case, results = cases[i // 2], [rank[i] for rank in per_rank]
        for result in results:
            assert result["skipped"] == sorted(plan.bad), case
            assert result["touched"] == [], case
            assert result["progress"].updates == STEPS - BAD
        finite = [math.isfinite(loss) for loss in results[0]["losses"]["losses"]]
        assert finite == [plan.bad.get(step, ("", "", "gradient"))[2] == "gradient" for step in range(1, STEPS + 1)], case
        assert math.isfinite(results[0]["losses"]["loss"])
    for i in range(0, len(plans), 2):
        one, other = per_rank[0][i]["state"], per_rank[0][i + 1]["state"]
        for key, tensors in one.items():
            assert all(torch.equal(tensor, other[key][name]) for name, tensor in tensors.items()), (cases[i // 2], key)
            assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def poison(first: int, last: int) -> None:
    """In this process, x0 of the positions from first to last is NaN."""
    from fasttrain import trainer

    build = trainer.build_objective

    def poisoned(*args: Any) -> Any:
        objective = build(*args)

        def call(model: Any, clean: torch.Tensor, cond: Cond, position: torch.Tensor, dtype: torch.dtype) -> Any:
            bad = (first <= position) & (position <= last)
            return objective(model, torch.where(bad[:, None, None, None], math.nan, clean), cond, position, dtype=dtype)

        return call

    trainer.build_objective = poisoned  # type: ignore[assignment]


def test_too_many_in_a_row_end_the_run_with_a_report_and_would_again(tmp_path: Path, digits: Path):
    """A single bad step before is only skipped; the row of bad ones begins in step 9 and would not end."""
    training, folder = {"steps": 40, "max_skipped": 4, "precision": "bf16"}, tmp_path / "run"
    raw = plain_config(folder, digits, training=training, checkpoint={"every": 5}, log={"every": 10, "tensorboard": False})
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    for _ in range(2):
        done = fasttrain("train", tmp_path / "run.yaml", before=_poison_twice)
        assert done.status == Status.DIVERGED, done
        assert "4 steps in a row, 9 to 12, had a loss or gradient that was not finite" in done.err
        assert f"fasttrain replay {folder} 9" in done.err and "optimizer.learning_rate" in done.err
    assert "step 3 skipped on all ranks" in done.out or "continuing from" in done.out
    skipped = list(records(folder / "skipped.jsonl"))
    assert [(record["step"], record["position"], record["images"], record["ranks"]) for record in skipped] == [
        (step, (step - 1) * 16, 16, [0]) for step in (3, 9, 10, 11, 12)
    ]
    report = json.loads((folder / "diverged.json").read_text())
    assert (report["steps"], report["last_checkpoint"]) == ([9, 10, 11, 12], "step-00000010")
    assert fasttrain("export", folder, tmp_path / "weights.safetensors").status == 0


def _poison_twice() -> None:
    poison(2 * 16 + 5, 2 * 16 + 5)
    poison(8 * 16, 10**9)


def _row_of_bad_steps(processes: Processes, raw: dict[str, Any]) -> tuple[str, int]:
    trainer = start(processes, raw)
    trainer.objective = Planted(trainer, Plan({step: (1, 0, "overflow") for step in (2, 4, 5, 6, 7)}))
    trainer.skips = Skips(trainer.config, processes)
    try:
        for step in range(1, 9):
            if trainer.train_step():
                trainer.skips.taken()
            else:
                trainer.skips.note(step, trainer.progress.position - 16, math.inf, 1e-3, trainer.meters)
    except DivergedError as error:
        return str(error), trainer.progress.step
    finally:
        trainer.loader.close()
        trainer.skips.close()
    return "never ended", 0


def test_all_ranks_end_at_the_same_step_and_name_the_rank(tmp_path: Path, digits: Path):
    raw = plain_config(tmp_path / "run", digits, deepspeed=zero(2), training={"max_skipped": 3})
    (told, step), (other, also) = run_ranks(2, _row_of_bad_steps, raw)
    assert (told, step) == (other, also) and step == 6 and "4 to 6" in told
    assert [record["ranks"] for record in records(tmp_path / "run" / "skipped.jsonl")] == [[1]] * 4


def _resumed(processes: Processes, raw: dict[str, Any], step: int) -> list[int]:
    from tests.runs import config

    skips = Skips(config(**raw), processes)
    skips.resume(step)
    skips.close()
    return [record["step"] for record in skips.in_a_row]


def test_a_resumed_run_counts_on_and_forgets_what_it_takes_again(tmp_path: Path):
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (3, 7, 8, 9, 10)))
    raw = {"run_dir": tmp_path, "shards": tmp_path}
    assert run_ranks(2, _resumed, raw, 9) == [[7, 8, 9], [7, 8, 9]]
    assert [record["step"] for record in records(tmp_path / "skipped.jsonl")] == [3, 7, 8, 9]
