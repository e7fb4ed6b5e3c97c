"""How many parameters a model has, and how many bytes of them a rank holds: known before anything is allocated."""

import math
from typing import NamedTuple

import torch

from fasttrain.models.architecture import Transformer

FP32 = 4


class ParameterCount(NamedTuple):
    """Elements in a model's parameters: all of them, and those that are trained."""

    total: int
    trained: int


def count_parameters(config: Transformer) -> ParameterCount:
    """The counts of the model that this config builds, without allocating it."""
    with torch.device("meta"):
        parameters = list(config.build().parameters())
    return ParameterCount(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))


def memory_per_rank(
    parameters: int, stage: int, world_size: int, weights_bytes: int, ema_count: int, offloaded: bool = False
) -> dict[str, int]:
    """Bytes a rank keeps from step to step under ZeRO, for AdamW with averages as optimizer state.

    ZeRO 1 divides optimizer and averages by the world size, ZeRO 2 the gradients as well, ZeRO 3 the weights as well
    (Rajbhandari et al. 2020, figure 1). Assumed, and so an estimate:

    - gradients are kept in the weights' dtype;
    - the optimizer holds two fp32 moments and an fp32 master copy; with fp32 weights, only ZeRO 1 and 2 and offload make that copy;
    - each average is fp32;
    - activations, communication buckets, buffers and the allocator's slack come on top, as do, under ZeRO 3, the layers
      gathered at the moment.

    Args:
        parameters: trained elements of the whole model.
        stage: of ZeRO, 0 to 3.
        weights_bytes: per weight, 2 (bf16) or 4 (fp32).
        ema_count: averages kept.
        offloaded: optimizer and averages lie in the host's memory, with fp32 gradients beside them and, under ZeRO 1 and 2, a buffer
            through which the new weights travel.

    Returns:
        Bytes of the device's memory under "weights", "gradients", "optimizer", "ema" and "total"; of the host's under "host".

    Raises:
        ValueError: stage is not 0 to 3, world_size is not positive, or offloaded without ZeRO.
    """
    if stage not in range(4) or world_size < 1:
        raise ValueError(f"ZeRO stage must be 0 to 3 and world_size at least 1, got {stage} and {world_size}")
    if offloaded and stage == 0:
        raise ValueError("only ZeRO 1 to 3 offload the optimizer, got stage 0")
    share = math.ceil(parameters / world_size)
    optimizer_elements = share if stage >= 1 else parameters
    master = 1 if weights_bytes < FP32 or stage in (1, 2) or offloaded else 0
    held = {
        "weights": (share if stage >= 3 else parameters) * weights_bytes,
        "gradients": (share if stage >= 2 else parameters) * weights_bytes,
        "optimizer": optimizer_elements * FP32 * (2 + master),
        "ema": optimizer_elements * FP32 * ema_count,
    }
    host = 0
    if offloaded:
        host = held["optimizer"] + held["ema"] + share * (FP32 + (weights_bytes if stage < 3 else 0))
        held |= {"optimizer": 0, "ema": 0}
    return {**held, "total": sum(held.values()), "host": host}
