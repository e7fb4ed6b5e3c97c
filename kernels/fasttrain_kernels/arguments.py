"""What the operations ask of their arguments: each check names the argument and shows what it got."""

import torch
from torch import Tensor

from fasttrain_kernels.philox import int64_tensor


def require_per_sample(batch: int, **tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is [batch]."""
    for name, tensor in tensors.items():
        if tensor.shape != (batch,):
            raise ValueError(f"{name} must be [{batch}], one value a sample, got {list(tensor.shape)}")


def require_float(**tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is of a floating-point type."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point type, got {tensor.dtype}")


def require_same_device(device: torch.device, **tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is on `device`."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}")


def require_constant(differentiable: str, **tensors: Tensor) -> None:
    """Raises ValueError if a tensor wants a gradient that the operation does not compute."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"only {differentiable} gets a gradient: detach {name}, or call the reference")


def require_data(**tensors: Tensor) -> None:
    """Raises ValueError if a tensor wants a gradient from an operation that has none."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"nothing gets a gradient here: detach {name}, or call the reference")


def draw_key(seed: Tensor | int, position: Tensor, batch: int, device: torch.device) -> Tensor:
    """The seed as a [] int64 tensor on `device`, after checking that `position` is [batch] int64 there."""
    seed = int64_tensor(seed, device)
    require_per_sample(batch, position=position)
    if seed.numel() != 1 or seed.dtype != torch.int64 or position.dtype != torch.int64:
        raise ValueError(f"seed must be one int64 and position int64, got {list(seed.shape)} {seed.dtype} and {position.dtype}")
    require_same_device(device, seed=seed, position=position)
    return seed
