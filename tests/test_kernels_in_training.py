"""The Triton kernels inside real training steps, in Triton's interpreter: the trainer and the model call them, and the losses agree."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.engine.distributed import Processes
from tests.ranks import run_ranks
from tests.runs import plain_config, trace

STEPS = 3
MODEL = {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 4}


def _raw(tmp_path: Path, digits: Path, kernels: str) -> dict[str, Any]:
    raw = plain_config(tmp_path / kernels, digits, kernels=kernels, training={"global_batch": 2}, diffusion={"prediction": "v"})
    return {**raw, "model": MODEL}


def _interpreted(processes: Processes, raw: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    from tests.kernels.interpreter import interpreting

    with interpreting() as launches:
        result = trace(processes, raw, STEPS)
    return result, {launch.kernel.fn.__name__ for launch in launches}


def test_training_with_the_kernels_equals_training_with_the_references(tmp_path: Path, digits: Path):
    pytest.importorskip("triton")
    [(with_kernels, launched)] = run_ranks(1, _interpreted, _raw(tmp_path, digits, "triton"))
    [with_references] = run_ranks(1, trace, _raw(tmp_path, digits, "reference"), STEPS)
    forward = {"_noising_kernel", "_adaln_forward_kernel", "_block_sums_kernel", "_finish_kernel"}
    assert launched == forward | {"_adaln_backward_kernel", "_adaln_sum_kernel", "_gradient_kernel"}
    torch.testing.assert_close(with_kernels["losses"], with_references["losses"], rtol=1e-5, atol=0)
    assert sorted(with_kernels["state"]) == sorted(with_references["state"])
    for name, weight in with_references["state"]["master"].items():
        torch.testing.assert_close(with_kernels["state"]["master"][name], weight, rtol=1e-3, atol=2e-5)
