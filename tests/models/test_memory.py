"""The memory estimate against what it says it assumes, and the counts against a real model."""

import pytest

from fasttrain.models import MODELS
from fasttrain.models.memory import count_parameters, memory_per_rank


def test_zero_0_in_bf16_is_16_bytes_a_parameter_and_4_an_average():
    memory = memory_per_rank(1000, stage=0, world_size=8, weights_bytes=2, ema_count=1)
    assert memory == {"weights": 2000, "gradients": 2000, "optimizer": 12_000, "ema": 4000, "total": 20_000, "host": 0}


@pytest.mark.parametrize(("stage", "weights", "gradients", "optimizer"), [(1, 2000, 2000, 1500), (2, 2000, 250, 1500), (3, 250, 250, 1500)])
def test_each_stage_divides_one_thing_more(stage, weights, gradients, optimizer):
    memory = memory_per_rank(1000, stage, world_size=8, weights_bytes=2, ema_count=2)
    assert memory["weights"] == weights
    assert memory["gradients"] == gradients
    assert memory["optimizer"] == optimizer
    assert memory["ema"] == 1000
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")


@pytest.mark.parametrize(("stage", "per_parameter"), [(0, 8), (1, 12), (2, 12), (3, 8)])
def test_fp32_weights_need_a_master_copy_only_under_zero_1_and_2(stage, per_parameter):
    assert memory_per_rank(100, stage, world_size=1, weights_bytes=4, ema_count=0)["optimizer"] == 100 * per_parameter


def test_an_indivisible_count_is_padded():
    assert memory_per_rank(10, 3, world_size=4, weights_bytes=4, ema_count=0)["weights"] == 3 * 4


@pytest.mark.parametrize(("stage", "host"), [(1, 12 + 4 + 4 + 2), (2, 12 + 4 + 4 + 2), (3, 12 + 4 + 4)])
def test_offload_moves_the_state_to_the_host(stage, host):
    memory = memory_per_rank(1000, stage, world_size=4, weights_bytes=2, ema_count=1, offloaded=True)
    assert memory["optimizer"] == memory["ema"] == 0 and memory["total"] == memory["weights"] + memory["gradients"]
    assert memory["host"] == 250 * host


def test_there_is_no_offload_without_zero():
    with pytest.raises(ValueError, match="only ZeRO 1 to 3 offload"):
        memory_per_rank(10, 0, 1, 4, 0, offloaded=True)


@pytest.mark.parametrize(("stage", "world_size"), [(4, 1), (-1, 1), (1, 0)])
def test_impossible_requests_are_refused(stage, world_size):
    with pytest.raises(ValueError, match="ZeRO stage"):
        memory_per_rank(10, stage, world_size, 4, 0)


@pytest.mark.parametrize("name", ["vit-tiny", "dit-tiny"])
def test_counts_equal_the_built_model(name):
    config = MODELS.build({"name": name, "input_size": 8, "channels": 1, "num_classes": 10})
    parameters = list(config.build().parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    assert count_parameters(config) == (sum(p.numel() for p in parameters), trained)
