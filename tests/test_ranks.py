"""The processes of tests begin with what they need: one module of a new release imported in each costs the suite minutes."""

import sys
from pathlib import Path
from typing import Any

import pytest

from fasttrain.engine.distributed import Processes
from tests.ranks import run_ranks
from tests.runs import plain_config, trace, zero


def _imports(processes: Processes, raw: dict[str, Any]) -> set[str]:
    before = set(sys.modules)
    trace(processes, raw, 1)
    return set(sys.modules) - before


@pytest.mark.parametrize("stage", [0, 3])
def test_training_imports_nothing_that_a_process_could_have_begun_with(stage: int, tmp_path: Path, digits: Path):
    [more] = run_ranks(1, _imports, plain_config(tmp_path / "run", digits, deepspeed=zero(stage)))
    assert len(more) < 10, sorted(more)
