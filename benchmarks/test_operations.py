"""pytest-benchmark's small ones: every operation, forward and with its backward, in seconds: `pytest benchmarks`.

On a CPU they time the references, on a GPU the kernels, warm and at 32 samples: a quick look at one operation (`-k adaln`) and its
statistics, not a claim. The claims' figures come from `benchmarks.kernels`, with a cold L2 and the other arms beside.
"""

import itertools
from typing import Any

import pytest
import torch
from fasttrain_kernels.cases import CASES
from fasttrain_kernels.dispatch import choose
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arms import Region
from benchmarks.timing import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BATCH = 32 if DEVICE.type == "cuda" else 1
PARTS = {"forward": Region.forward, "forward and backward": Region.both}


def _points() -> list[Any]:
    """Each operation in each part, in its first setting."""
    pairs = itertools.product(CASES, PARTS)
    return [pytest.param(name, part, id=f"{name}-{part}") for name, part in pairs if part == "forward" or CASES[name].differentiable]


@pytest.mark.parametrize(("name", "part"), _points())
def test_operation(name: str, part: str, benchmark: BenchmarkFixture) -> None:
    case = CASES[name]
    sample = case.real[0] if DEVICE.type == "cuda" else case.sample
    inputs = case.inputs((BATCH, *sample), DTYPE, DEVICE)
    region = Region(case.call, inputs, case, case.options[0])
    benchmark.group = f"{name}, {choose('auto', next(iter(inputs.values())))}"

    def run() -> None:
        PARTS[part](region)
        synchronize(DEVICE)

    benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=3)
