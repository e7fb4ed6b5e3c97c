"""The slowest rank is named with the right score and share under every ZeRO stage, and what waiting for data costs is told."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.engine.distributed import Processes
from fasttrain.stragglers import Pace, told
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero

# Every rank's wait for data in a step: long beside the few milliseconds of the network, whose time a busy machine changes.
WAIT, STEPS = 1.0, 2


def _slow(trainer: Any, slow: int) -> None:
    """Every rank waits for its data; the slow one sleeps as long again before each forward pass, and as long as the last one took."""
    seconds, objective, batches, took = WAIT / trainer.accumulation_steps, trainer.objective, trainer.batches, [0.0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if trainer.processes.rank == slow:
            time.sleep(seconds + took[0])
        began = time.perf_counter()
        loss = objective(*args, **kwargs)
        took[0] = time.perf_counter() - began
        return loss

    def loaded() -> Iterator[Any]:
        for batch in batches:
            time.sleep(seconds)
            yield batch

    trainer.objective, trainer.batches = forward, loaded()


def reports(processes: Processes, raws: list[dict[str, Any]], slow: int) -> list[dict[str, Any]]:
    """What each of these runs tells of its slowest rank and of waiting for data, with one rank slowed; call on every rank."""
    found = []
    for raw in raws:
        trainer = start(processes, raw)
        trainer.train_step()  # the first also makes what the others use
        trainer.pace.report(1.0)
        _slow(trainer, slow)
        began = time.perf_counter()
        for _ in range(STEPS):
            trainer.train_step()
        found.append(trainer.pace.report((time.perf_counter() - began) / STEPS))
        trainer.loader.close()
        trainer.engine.destroy()
    return found


@pytest.mark.parametrize(("world_size", "slow", "stages"), [(2, 1, (0, 3)), (4, 2, (1, 2))])
def test_a_rank_twice_as_slow_scores_a_half(world_size: int, slow: int, stages: tuple[int, ...], tmp_path: Path, digits: Path):
    """Under ZeRO 3 the others wait for it within their forward passes, where weights are gathered."""
    training = {"micro_batch": 16 // world_size // 2}
    raws = [plain_config(tmp_path / "run", digits, deepspeed=zero(stage), training=training) for stage in stages]
    for stage, report in zip(stages, run_ranks(world_size, reports, raws, slow)[0], strict=True):
        slowest, wait = report["slowest"], report["data_wait"]
        assert slowest["rank"] == slow and slowest["host"], (stage, report)
        assert slowest["score"] == pytest.approx(0.5, abs=0.05), (stage, report)
        assert 0.25 < slowest["share"] < 0.6, (stage, report)
        assert "slow (score 0." in (told(slowest) or ""), stage
        assert wait["p50"] == pytest.approx(WAIT, rel=0.3) and wait["p99"] >= wait["p50"] and 0.2 < wait["share"] < 0.6, (stage, report)


def _even(processes: Processes) -> dict[str, Any]:
    pace = Pace(processes)
    for step in range(100):
        pace.mark("data")
        time.sleep(0.2 if step == 50 and processes.rank == 1 else 0)
        pace.mark("forward")
        time.sleep(0.01)
        pace.mark("backward")
        pace.end_step()
    return pace.report(0.1)


def test_one_long_wait_for_data_shows_in_the_99th_percentile_only():
    [report, _] = run_ranks(2, _even)
    assert report["data_wait"]["p50"] < 0.01 < 0.2 <= report["data_wait"]["p99"]


def test_even_ranks_are_not_told_and_one_rank_has_nobody_to_compare_with():
    alone = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None)  # type: ignore[arg-type]
    object.__setattr__(alone, "gather", lambda item: [item])
    assert Pace(alone).report(1.0) == {"data_wait": {}, "slowest": None}
    assert told(None) is None
    assert told({"rank": 1, "host": "a", "score": 0.93, "share": 0.02}) is None
