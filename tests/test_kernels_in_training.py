"""The Triton kernels inside real training steps, in Triton's interpreter: trainer, model and update call them, and the losses agree."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.engine.distributed import Processes
from tests.ranks import run_ranks
from tests.runs import plain_config, trace

STEPS = 3
# Smaller than their presets, because the interpreter takes about a microsecond a number; between them they call every operation.
NETWORKS = {
    "dit": {"name": "dit", "depth": 2, "width": 32, "heads": 2, "patch": 4, "qk_norm": True, "rotary": True},
    "vit": {"name": "vit", "depth": 2, "width": 32, "heads": 2, "patch": 4, "num_timesteps": 1000},
    "mmdit": {"name": "mmdit", "depth": 1, "width": 32, "heads": 2, "patch": 4, "rotary": True},
}
NOISE_AND_LOSS = {"_uniform_kernel", "_noising_kernel", "_block_sums_kernel", "_finish_kernel", "_gradient_kernel"}
FUSED = {"norm_forward_kernel", "norm_backward_kernel", "_bias_gelu_forward_kernel", "_bias_gelu_backward_kernel"}
QK_NORM = {"_qk_norm_forward_kernel", "_qk_norm_backward_kernel"}
JOINT_QK_NORM = {"joint_qk_norm_forward_kernel", "joint_qk_norm_backward_kernel"}
HEADS = {"dit": QK_NORM, "vit": set(), "mmdit": JOINT_QK_NORM}


def settings(run_dir: Path, digits: Path, network: str, kernels: Any) -> dict[str, Any]:
    """A run of a very small network whose operations are computed by `kernels`."""
    raw = plain_config(run_dir, digits, kernels=kernels, training={"global_batch": 2}, diffusion={"prediction": "v"})
    return {**raw, "model": NETWORKS[network]}


def interpreted(processes: Processes, raw: dict[str, Any], steps: int) -> tuple[dict[str, Any], set[str]]:
    """`trace` with kernels in Triton's interpreter, and the names of those that were launched."""
    from tests.kernels.interpreter import interpreting

    with interpreting() as launches:
        result = trace(processes, raw, steps)
    return result, {launch.kernel.fn.__name__ for launch in launches}


@pytest.mark.parametrize("network", NETWORKS)
def test_training_with_the_kernels_equals_training_with_the_references(network: str, tmp_path: Path, digits: Path):
    pytest.importorskip("triton")
    [(with_kernels, launched)] = run_ranks(1, interpreted, settings(tmp_path / "triton", digits, network, "triton"), STEPS)
    [with_references] = run_ranks(1, trace, settings(tmp_path / "reference", digits, network, "reference"), STEPS)
    expected = NOISE_AND_LOSS | FUSED | HEADS[network]
    assert expected <= launched, expected - launched
    torch.testing.assert_close(with_kernels["losses"], with_references["losses"], rtol=1e-5, atol=0)
    assert sorted(with_kernels["state"]) == sorted(with_references["state"])
    for name, weight in with_references["state"]["master"].items():
        torch.testing.assert_close(with_kernels["state"]["master"][name], weight, rtol=1e-3, atol=2e-5)


def test_one_operation_can_be_turned_off(tmp_path: Path, digits: Path):
    pytest.importorskip("triton")
    kernels = {"default": "triton", "bias_gelu": "reference", "uniform": "reference"}
    [(_, launched)] = run_ranks(1, interpreted, settings(tmp_path, digits, "dit", kernels), 1)
    off = {name for name in launched if "gelu" in name or "uniform" in name}
    assert not off and launched >= QK_NORM | {"norm_forward_kernel", "_noising_kernel"}
