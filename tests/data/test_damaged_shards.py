"""A short version of `python -m benchmarks.damage`: every way of damage, each loss counted exactly, no label on another's image."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.damage import AFTER, BEFORE, PREPARED, Sound, make_sets, run_trial
from benchmarks.damaged_shards import KINDS


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("kind", [PREPARED, BEFORE, AFTER])
def test_damage_costs_what_it_touches(sets: dict[str, Sound], tmp_path: Path, kind: str, way: str):
    for seed in range(2):
        damaged = KINDS[way](np.random.default_rng((100, seed)), sets[kind].content)
        assert run_trial(sets[kind], damaged, tmp_path / str(seed)).faults == []


@pytest.mark.parametrize("kind", [PREPARED, BEFORE])
def test_a_shard_cut_anywhere_loses_exactly_what_is_counted(sets: dict[str, Sound], tmp_path: Path, kind: str):
    places = np.random.default_rng(5).integers(0, len(sets[kind].content), 10).tolist()
    outcomes = [run_trial(sets[kind], sets[kind].content[:place], tmp_path / str(place)) for place in places]
    assert [outcome.faults for outcome in outcomes] == [[]] * 10
    assert sum(outcome.lost for outcome in outcomes) > 20
