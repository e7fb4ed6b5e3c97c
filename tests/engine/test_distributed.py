"""Processes: a mistake is told once, by a rank that met it."""

import os

import pytest

from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from tests.ranks import run_ranks


def _tellers(processes: Processes) -> tuple[bool, bool]:
    same = distributed._first_to_meet("the same on every rank")
    own = distributed._first_to_meet("a shard of this rank") if processes.rank == 1 else False
    processes.barrier()
    return same, own


def test_what_all_ranks_meet_is_told_once_and_what_one_meets_by_that_one():
    results = run_ranks(2, _tellers)
    assert sorted(same for same, _ in results) == [False, True]
    assert [own for _, own in results] == [False, True]


def test_a_launcher_that_forgets_the_local_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK is not: export it too"), distributed.joined(10):
        pass


def _on_this_machine(processes: Processes) -> str:
    return os.environ["LOCAL_WORLD_SIZE"]


def test_each_rank_knows_how_many_share_its_machine():
    assert run_ranks(2, _on_this_machine) == ["2", "2"]
