"""What the device can do at most, measured in the same run as everything that is compared with it, and what its datasheet says."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.timing import Clock, l2_bytes, spread
from fasttrain.metrics import peak_flops

GIB = 2**30
DATASHEET_BANDWIDTH = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "B200": 8.0e12, "A100": 2.04e12, "L40S": 0.864e12}
"""Bytes a second of the vendors' datasheets, by a part of the GPU's name; the first that fits."""


def copy_bandwidth(device: torch.device, repeats: int = 20) -> dict[str, Any]:
    """Bytes a second, read and written counted, of a copy on the device of many times the L2: the ceiling of memory-bound kernels."""
    size = 2 * GIB if device.type == "cuda" else 32 * 2**20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = spread(Clock(device, cold=False).series(lambda: target.copy_(source), repeats))
    return {
        "bytes": 2 * size,
        "bytes_per_second": 2 * size / seconds["median"],
        "datasheet": datasheet_bandwidth(device),
        "seconds": seconds,
    }


def matmul_rate(device: torch.device, shapes: Sequence[tuple[int, int, int]], repeats: int = 20) -> dict[str, Any]:
    """FLOP/s of bf16 products [m, k] x [k, n] on random numbers, each shape apart; the best is the measured peak."""
    clock = Clock(device)
    rates = [{"mnk": [m, n, k], "flops_per_second": _rate(clock, m, n, k, repeats)} for m, n, k in shapes]
    return {"best": max(rate["flops_per_second"] for rate in rates), "datasheet": peak_flops(device), "shapes": rates}


def training_shapes(width: int, tokens: int) -> list[tuple[int, int, int]]:
    """(m, n, k) of a block's matrix products at this many tokens in all, and a large square one."""
    return [(tokens, 3 * width, width), (tokens, width, width), (tokens, 4 * width, width), (tokens, width, 4 * width), (8192, 8192, 8192)]


def datasheet_bandwidth(device: torch.device) -> float | None:
    """The datasheet's bytes a second; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in DATASHEET_BANDWIDTH.items() if known in name), None)


def several_caches(device: torch.device, factor: int = 5) -> int:
    """Bytes that are `factor` times the device's L2; a few KiB on a CPU, where nothing is claimed of caches."""
    return factor * l2_bytes(device) if device.type == "cuda" else 4096


def _rate(clock: Clock, m: int, n: int, k: int, repeats: int) -> float:
    left = torch.randn(m, k, device=clock.device, dtype=torch.bfloat16)
    right = torch.randn(k, n, device=clock.device, dtype=torch.bfloat16)
    for _ in range(3):
        left @ right
    return 2 * m * n * k / spread(clock.series(lambda: left @ right, repeats))["median"]
