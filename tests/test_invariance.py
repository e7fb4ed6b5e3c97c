"""The same run under every ZeRO stage, world size and accumulation: the same draws bit for bit, the same losses to rounding."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import GLOBAL_BATCH, merged, plain_config, traces, zero

STEPS = 20
STAGES = (0, 1, 2, 3)
ACCUMULATIONS = (1, 4)
# Two ranks run every stage with either accumulation. With one and with four, a stage has one of them: so each stage, world size and
# accumulation still meets each value of the other two.
SETTINGS = {2: tuple(itertools.product(STAGES, ACCUMULATIONS)), 1: ((0, 1), (1, 4), (2, 1), (3, 4)), 4: ((0, 4), (1, 1), (2, 4), (3, 1))}
# Sums of fp32 numbers in another order: the loss of 20 steps moves in its last bits, the weights a little more.
LOSS_ROUNDING = 5e-6


def _raws(tmp_path: Path, digits: Path, world_size: int) -> list[dict[str, Any]]:
    return [
        plain_config(
            tmp_path / f"zero{stage}-accumulate{accumulation}-world{world_size}",
            digits,
            data={"flip": True},
            training={"micro_batch": GLOBAL_BATCH // (world_size * accumulation), "clip": 1.0},
            deepspeed=zero(stage),
        )
        for stage, accumulation in SETTINGS[world_size]
    ]


def _all_traces(tmp_path: Path, digits: Path, world_size: int) -> list[dict[str, Any]]:
    per_rank = run_ranks(world_size, traces, _raws(tmp_path, digits, world_size), STEPS)
    return [merged(list(shares)) for shares in zip(*per_rank, strict=True)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[dict[str, Any]]:
    return _all_traces(tmp_path_factory.mktemp("world1"), digits, 1)


def test_every_position_is_drawn_once_and_the_loss_falls(reference: list[dict[str, Any]]):
    first = reference[0]
    assert sorted(first["drawn"]) == list(range(STEPS * GLOBAL_BATCH))
    assert len({noise for _, _, noise in first["drawn"].values()}) == STEPS * GLOBAL_BATCH
    assert sum(first["losses"][-5:]) < 0.7 * sum(first["losses"][:5])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stage_world_size_and_accumulation_change_nothing(world_size: int, tmp_path: Path, digits: Path, reference: list[dict[str, Any]]):
    results = reference if world_size == 1 else _all_traces(tmp_path, digits, world_size)
    assert len(results) == len(SETTINGS[world_size])
    for result in results:
        assert result["drawn"] == reference[0]["drawn"]
        torch.testing.assert_close(result["losses"], reference[0]["losses"], rtol=LOSS_ROUNDING, atol=0)
        for name, average in reference[0]["state"]["ema"].items():
            torch.testing.assert_close(result["state"]["ema"][name], average, rtol=1e-3, atol=2e-5)
