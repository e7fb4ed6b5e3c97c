"""How many processors a device has: what a grid is cut for when every program owns as many rows as it can."""

import torch


def processors(device: torch.device) -> int:
    """The GPU's streaming multiprocessors; one where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
