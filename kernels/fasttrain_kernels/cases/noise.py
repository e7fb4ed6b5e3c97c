"""Cases of the operations that draw random numbers: uniform numbers, noising, the weighted error, padded captions."""

import torch

from fasttrain_kernels.cases.case import Case, Inputs, Shape, draws, randn
from fasttrain_kernels.latent_noising import latent_noising, latent_noising_reference
from fasttrain_kernels.noising import noising, noising_reference
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.text_padding import text_padding, text_padding_reference
from fasttrain_kernels.uniform import uniform, uniform_reference
from fasttrain_kernels.weighted_mse import weighted_mse, weighted_mse_reference

_SHAPES = ((5, 4, 8, 8), (2, 3, 7, 5), (1, 1, 1, 1), (3, 1025), (2, 4, 32, 32), (0, 4, 8, 8))


def uniform_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Positions and a seed; no type but their own."""
    return {name: draws(shape[0], device)[name] for name in ("position", "seed")}


def _path(batch: int, device: torch.device) -> Inputs:
    angle = torch.linspace(0.0, 1.5, batch, device=device)
    return {"alpha": angle.cos(), "sigma": angle.sin(), **draws(batch, device)}


def noising_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x0 of `shape` and a variance-preserving path that includes no noise at all."""
    return {"x0": randn(shape, dtype, device, 0), **_path(shape[0], device)}


def latent_noising_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Posteriors of `shape` [B, 2, 2, C, H, W], which `shift` and `scale` turn into about unit variance, on `noising_inputs`' path."""
    channel = torch.arange(shape[3], device=device, dtype=torch.float32)
    stored = 2 * randn(shape, torch.float32, device, 0) + 0.5
    stored[:, :, 1] -= 3
    return {"stored": stored.to(dtype), "shift": 0.5 + 0.1 * channel, "scale": 0.5 / (1 + 0.1 * channel), **_path(shape[0], device)}


def weighted_mse_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """pred and x0 of `shape`; the first sample's target holds no noise, the others are v-targets; ranges 3, 0, 2, 4, 1 and on."""
    angle = torch.linspace(0.0, 1.5, shape[0], device=device)
    return {
        "pred": randn(shape, dtype, device, 1),
        "x0": randn(shape, dtype, device, 0),
        "x0_coef": torch.where(angle == 0, 1.0, -angle.sin()),
        "eps_coef": torch.where(angle == 0, 0.0, angle.cos()),
        "weight": torch.linspace(0.25, 4.0, shape[0], device=device),
        **draws(shape[0], device),
        "timestep_range": (3 + 2 * torch.arange(shape[0], device=device)) % 5,
    }


def text_padding_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Captions of `shape` [B, M, E], in turn as long as their places and half as long; each channel has a mean, what is behind is 9."""
    tokens = randn(shape, torch.float32, device, 0) + torch.linspace(-3.0, 3.0, shape[2], device=device)
    half = torch.arange(shape[0], device=device) % 2
    length = torch.where(half == 1, max(1, shape[1] // 2), shape[1])
    behind = torch.arange(shape[1], device=device)[:, None] >= length[:, None, None]
    return {"tokens": tokens.masked_fill(behind, 9.0).to(dtype), "length": length, **draws(shape[0], device)}


NOISE_CASES = {
    "uniform": Case(
        reference=uniform_reference,
        call=uniform,
        inputs=uniform_inputs,
        differentiable=(),
        shapes=((5,), (2,), (1,), (129,), (0,)),
        sample=(),
        real=((),),
        minimum=(16, 0),
        smallest=((1,),),
        options=({"purpose": Purpose.TIMESTEP}, {"purpose": Purpose.TIMESTEP, "stratified": True}),
    ),
    "latent_noising": Case(
        reference=latent_noising_reference,
        call=latent_noising,
        inputs=latent_noising_inputs,
        differentiable=(),
        shapes=((5, 2, 2, 4, 8, 8), (2, 2, 2, 3, 7, 5), (1, 2, 2, 1, 1, 1), (3, 2, 2, 2, 23, 45), (0, 2, 2, 4, 8, 8)),
        sample=(2, 2, 4, 32, 32),
        real=((2, 2, 4, 32, 32),),
        minimum=(2.5, 0),
        smallest=((1, 1, 2, 1, 1, 1),),
        options=({"flip": False}, {"flip": True}),
    ),
    "noising": Case(
        reference=noising_reference,
        call=noising,
        inputs=noising_inputs,
        differentiable=("x0",),
        shapes=_SHAPES,
        sample=(4, 32, 32),
        real=((4, 32, 32),),
        minimum=(4, 4),
    ),
    "weighted_mse": Case(
        reference=weighted_mse_reference,
        call=weighted_mse,
        inputs=weighted_mse_inputs,
        differentiable=("pred",),
        shapes=_SHAPES,
        sample=(4, 32, 32),
        real=((4, 32, 32),),
        minimum=(4, 6),
        options=({"ranges": 6},),
    ),
    "text_padding": Case(
        reference=text_padding_reference,
        call=text_padding,
        inputs=text_padding_inputs,
        differentiable=(),
        shapes=((5, 3, 48), (2, 7, 33), (1, 77, 768), (3, 16, 1025), (2, 1, 1), (0, 3, 8), (2, 0, 8)),
        sample=(77, 768),
        real=((77, 768), (77, 1024), (77, 1152), (77, 4096)),
        minimum=(7.5, 0),
        smallest=((1, 1, 1), (2, 1, 48)),
        options=({"noise": 0.5},),
    ),
}
