"""A handful of kills by the harness that makes a hundred (`python -m benchmarks.faults`): real ranks, real SIGKILL, the real command."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fault_runs import Setting, uninterrupted, write_config
from benchmarks.kill_trials import MOMENTS, STAGES, STEPS_A_KILL, Kill, Killer

KILLS = 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_loses_ranks_again_and_again_ends_as_if_it_had_lost_none(stage: int, tmp_path: Path, digits: Path):
    steps = (KILLS + 1) * STEPS_A_KILL
    setting = Setting(tmp_path, digits, seed=stage, deadline=time.monotonic() + 120, trials=KILLS)
    whole = uninterrupted(tmp_path / "whole", write_config(tmp_path / "whole", digits, stage, steps))
    # Every moment is announced, or nothing could be aimed at it.
    assert set(MOMENTS) <= whole.seconds.keys()
    # Each stage is hit at other moments, in a checkpoint and outside of one.
    hits = Counter({moment: 1 for i, moment in enumerate(MOMENTS) if i % len(STAGES) != stage - 1})
    killer = Killer(tmp_path / "run", write_config(tmp_path / "run", digits, stage, steps), stage, whole, hits, seed=stage)
    chain = killer.run(KILLS, setting)
    assert chain.problems == []
    assert [kill.problem() for kill in chain.kills] == [None] * KILLS
    # One bit of one weight would have been noticed.
    next(iter(whole.state["master"].values())).view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    assert len(whole.differences(tmp_path / "run")) == 1


def test_a_kill_that_costs_what_was_saved_is_not_called_fine():
    place = {"stage": 1, "aimed": "data", "moment": "data", "rank": 1}
    fine: dict[str, Any] = {**place, "finished": 8, "newest": 6, "statuses": [138, -9], "notice_seconds": 1.0}
    assert Kill(**fine, resumed=6).problem() is None
    assert Kill(**fine, resumed=6).redone == 2
    assert "the next start began after 3" in (Kill(**fine, resumed=3).problem() or "")
    assert Kill(**fine, resumed=None).lost
    assert "not 138" in (Kill(**{**fine, "statuses": [1, -9]}, resumed=6).problem() or "")
    assert "6.0 s to notice" in (Kill(**{**fine, "notice_seconds": 6.0}, resumed=6).problem() or "")
