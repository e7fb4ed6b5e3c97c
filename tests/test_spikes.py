"""A step that loses far more than those before it is found at its exact step; ordinary noise, trends and skipped steps are not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fasttrain.lines import records
from fasttrain.spikes import RECENT, WARM_UP, Spikes, losses_by_step, recent_losses
from tests.commands import fasttrain
from tests.runs import plain_config

THRESHOLD = 8.0


def _noisy(steps: int, seed: int, spread: float = 0.15) -> np.ndarray:
    """A falling loss with log-normal noise."""
    noise = np.random.default_rng(seed).normal(0, spread, steps)
    return np.exp(-np.linspace(0, 1.5, steps) + noise)


def _judged(losses: np.ndarray, every: int = 50, **settings: float | None) -> list[int]:
    spikes, found = Spikes(**{"threshold": THRESHOLD, **settings}), []  # type: ignore[arg-type]
    for start in range(0, len(losses), every):
        found += [spike.step for spike in spikes.judge(start + 1, losses[start : start + every].tolist())]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_trend_are_no_spikes(seed: int):
    assert _judged(_noisy(1000, seed)) == []


@pytest.mark.parametrize("every", [1, 7, 50, 1000])
def test_a_threefold_loss_is_found_at_its_step_whatever_the_interval(every: int):
    losses = _noisy(1000, 0, spread=0.1)
    losses[[136, 700]] *= 3
    assert _judged(losses, every) == [137, 701]


def test_a_plain_standard_deviation_would_be_blind_after_a_spike():
    losses = _noisy(400, 0, spread=0.05)
    losses[200] *= 1000
    losses[202] *= 3
    assert _judged(losses) == [201, 203]
    recent = np.log(losses[100:202])
    assert (np.log(losses[202]) - recent.mean()) / recent.std() < THRESHOLD


def test_skipped_steps_and_the_first_ones_are_not_judged():
    losses = _noisy(200, 0, spread=0.05)
    losses[WARM_UP - 2] *= 100
    losses[100:120] = math.nan
    losses[130] = math.inf
    assert _judged(losses) == []


def test_constant_losses_need_more_than_a_percent():
    losses = np.full(200, 0.5)
    losses[100], losses[150] = 0.505, 0.6
    assert _judged(losses) == [151]


def test_nothing_is_flagged_where_it_is_switched_off():
    losses = _noisy(200, 0)
    losses[150] *= 100
    assert _judged(losses, threshold=None) == []


def test_a_resumed_run_judges_as_if_it_had_never_stopped(tmp_path: Path):
    losses = _noisy(600, 3, spread=0.1)
    losses[[310, 420]] *= 3
    path = tmp_path / "metrics.jsonl"
    chunks = [{"step": end, "losses": losses[end - 50 : end].tolist()} for end in range(50, 351, 50)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*chunks, {"step": 300, "held_out_loss": 1.0}]))
    before = recent_losses(path, 300)
    assert before == losses[300 - RECENT : 300].tolist()
    assert [spike.step for spike in Spikes(THRESHOLD, before).judge(301, losses[300:].tolist())] == [311, 421]
    assert next(losses_by_step({"step": 4, "losses": [1.0, "nan"]})) == (3, 1.0)


def _plant() -> None:
    """In this process, the loss of step 75 is three times as high."""
    from fasttrain import trainer

    build = trainer.build_objective

    def planted(*args):
        objective = build(*args)

        def call(model, clean, cond, position, dtype):
            loss = objective(model, clean, cond, position, dtype=dtype)
            times = 3.0 if int(position[0]) // 64 == 74 else 1.0
            return loss._replace(loss=loss.loss * times, weighted=loss.weighted * times)

        return call

    trainer.build_objective = planted


def test_a_run_tells_of_a_spike_with_its_positions(tmp_path: Path, digits: Path):
    raw = plain_config(tmp_path / "run", digits, training={"steps": 100, "global_batch": 64}, log={"every": 20})
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    done = fasttrain("train", tmp_path / "run.yaml", before=_plant)
    assert done.status == 0, done
    found = [record for record in records(tmp_path / "run" / "metrics.jsonl") if "spike" in record]
    assert [(record["step"], record["position"]) for record in found] == [(75, 74 * 64)]
    assert "loss spike at step 75" in done.out and "positions 4736 to 4799" in done.out and "replay" in done.out
    every = dict(pair for record in records(tmp_path / "run" / "metrics.jsonl") for pair in losses_by_step(record))
    assert sorted(every) == list(range(1, 101)) and found[0]["spike"]["loss"] == every[75]
