"""Weights that a run solves for: at which steps, the same on any ranks, and the same after a stop at any step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.config import parse_config
from fasttrain.diffusion.timestep_weights import Pareto
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.pareto_weights import weights_of
from fasttrain.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero

WEIGHTING = {"name": "pareto", "ranges": 3, "every": 3, "samples": 8, "regularisation": 0.1}
STEPS, STOP = 6, 4


def raw(run_dir: Path, digits: Path, stage: int = 1, **weighting: Any) -> dict[str, Any]:
    return plain_config(
        run_dir, digits, diffusion={"weighting": {**WEIGHTING, **weighting}}, deepspeed=zero(stage), training={"micro_batch": 8}
    )


def steps(trainer: Trainer, count: int) -> list[tuple[float, ...]]:
    """The weights in effect in each of these steps."""
    used = []
    for _ in range(count):
        trainer.train_step()
        used.append(tuple(trainer.pareto.values or ()))
    return used


def whole_and_stopped(processes: Processes, folder: str, digits: str) -> dict[str, Any]:
    """Six steps in one go, and again with a save and a new start after the fourth, which is no step that solves."""
    whole = start(processes, raw(Path(folder) / "whole", Path(digits)))
    found: dict[str, Any] = {"whole": steps(whole, STEPS), "state": {key: whole.state.full(key) for key in whole.state.keys}}
    stopped = start(processes, raw(Path(folder) / "stopped", Path(digits)))
    found["stopped"] = steps(stopped, STOP)
    stopped.save()
    stopped.saver.finish()
    again = start(processes, raw(Path(folder) / "stopped", Path(digits)))
    found["stopped"] += steps(again, STEPS - STOP)
    found["state again"] = {key: again.state.full(key) for key in again.state.keys}
    return found


def test_weights_are_solved_every_so_many_steps_and_a_stopped_run_goes_on_with_the_same(tmp_path, digits):
    [found] = run_ranks(1, whole_and_stopped, str(tmp_path), str(digits))
    used = found["whole"]
    assert used[0] == used[1] == used[2] != used[3] == used[4] == used[5]
    assert sum(used[0]) == pytest.approx(3) and min(used[0]) > 0 and max(used[0]) > 1.05
    assert found["stopped"] == used
    for key, tensors in found["state"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, found["state again"][key][name]), (key, name)


def weights_on_ranks(processes: Processes, folder: str, digits: str, stage: int) -> tuple[list[tuple[float, ...]], dict[str, Any]]:
    trainer = start(processes, raw(Path(folder), Path(digits), stage))
    return steps(trainer, 4), trainer.state.full("master")


def test_ranks_and_zero_stages_agree(tmp_path, digits):
    [(alone, expected)] = run_ranks(1, weights_on_ranks, str(tmp_path / "1"), str(digits), 0)
    two = run_ranks(2, weights_on_ranks, str(tmp_path / "2"), str(digits), 2)
    for used, master in two:
        torch.testing.assert_close(torch.tensor(used), torch.tensor(alone), rtol=1e-3, atol=1e-4)
        if master:
            for name, tensor in master.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


def table_run(processes: Processes, folder: str, digits: str, weights: list[float]) -> dict[str, Any]:
    trainer = start(
        processes, plain_config(folder, digits, diffusion={"weighting": {"name": "table", "weights": weights}}, training={"micro_batch": 8})
    )
    for _ in range(3):
        trainer.train_step()
    return trainer.state.full("master")


def three_steps(processes: Processes, folder: str, digits: str) -> tuple[list[float], dict[str, Any]]:
    trainer = start(processes, raw(Path(folder), Path(digits)))
    return list(steps(trainer, 3)[0]), trainer.state.full("master")


def test_a_run_with_the_same_weights_in_a_table_is_the_same_run(tmp_path, digits):
    """Solving leaves nothing behind: the update sees the step's own gradients alone."""
    [(weights, solved)] = run_ranks(1, three_steps, str(tmp_path / "solved"), str(digits))
    [given] = run_ranks(1, table_run, str(tmp_path / "given"), str(digits), weights)
    assert all(torch.equal(tensor, given[name]) for name, tensor in solved.items())


@pytest.mark.parametrize("solver", ["ugd", "frank_wolfe"])
def test_the_solution_of_orthogonal_gradients(solver: str) -> None:
    """w_k ~ 1 / (|g_k|^2 + lambda), in units of their mean square 2: 1 / (0.5 + 0.5), 1 / (1.5 + 0.5)."""
    asked = Pareto(solver=solver, ranges=2, regularisation=0.5, iterations=5000)
    assert weights_of(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)), asked) == pytest.approx([4 / 3, 2 / 3], rel=1e-3)


@pytest.mark.parametrize("gram", [torch.zeros(2, 2), torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])])
def test_gradients_that_say_nothing_leave_weights_equal(gram: torch.Tensor) -> None:
    assert weights_of(gram.double(), Pareto(ranges=2)) == [1.0, 1.0]


def refused(processes: Processes, settings: dict[str, Any]) -> str:
    with pytest.raises(UserError) as told:
        Trainer(parse_config(settings, "test"), processes)
    return str(told.value)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"deepspeed": zero(3)}, "zero_optimization.stage to 2"),
        ({"diffusion": {"weighting": WEIGHTING, "uncertainty": True}}, "diffusion.uncertainty"),
    ],
)
def test_what_cannot_be_solved_for_is_refused_by_name(tmp_path, digits, changed, told):
    [message] = run_ranks(1, refused, {**raw(tmp_path / "run", digits), **changed})
    assert "pareto" in message and told in message


def test_samples_that_ranks_cannot_share_are_refused(tmp_path, digits):
    for message in run_ranks(2, refused, raw(tmp_path / "run", digits, samples=6)):
        assert "choose a multiple of 4" in message
