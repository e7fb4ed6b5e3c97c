"""Weighted squared error between a prediction and its diffusion target, with the noise drawn again instead of stored."""

from torch import Tensor
import torch

from fasttrain_kernels.philox import normal


def weighted_mse_reference(
    pred: Tensor, x0: Tensor, x0_coef: Tensor, eps_coef: Tensor, weight: Tensor, seed: Tensor | int, position: Tensor
) -> tuple[Tensor, Tensor]:
    """(weight * mse, mse) per sample in plain torch, computed in fp32 (float64 for a float64 pred)."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    per_sample = (-1,) + (1,) * (pred.dim() - 1)
    eps = normal(seed, position, x0.shape[1:]).to(wide)
    target = x0_coef.to(wide).view(per_sample) * x0.to(wide) + eps_coef.to(wide).view(per_sample) * eps
    mse = (pred.to(wide) - target).square().flatten(1).mean(1)
    return weight.to(wide) * mse, mse.detach()


def weighted_mse(
    pred: Tensor,
    x0: Tensor,
    x0_coef: Tensor,
    eps_coef: Tensor,
    weight: Tensor,
    seed: Tensor | int,
    position: Tensor,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    return weighted_mse_reference(pred, x0, x0_coef, eps_coef, weight, seed, position)
