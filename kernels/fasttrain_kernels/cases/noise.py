"""Cases of the operations that draw random numbers: uniform numbers, noising, the weighted error."""

import torch

from fasttrain_kernels.cases.case import Case, Inputs, Shape, draws, randn
from fasttrain_kernels.noising import noising, noising_reference
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform, uniform_reference
from fasttrain_kernels.weighted_mse import weighted_mse, weighted_mse_reference

_SHAPES = ((5, 4, 8, 8), (2, 3, 7, 5), (1, 1, 1, 1), (3, 1025), (2, 4, 32, 32), (0, 4, 8, 8))


def uniform_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Positions and a seed; no type but their own."""
    return {name: draws(shape[0], device)[name] for name in ("position", "seed")}


def noising_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x0 of `shape` and a variance-preserving path that includes no noise at all."""
    angle = torch.linspace(0.0, 1.5, shape[0], device=device)
    return {"x0": randn(shape, dtype, device, 0), "alpha": angle.cos(), "sigma": angle.sin(), **draws(shape[0], device)}


def weighted_mse_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """pred and x0 of `shape`; the first sample's target holds no noise, the others are v-targets."""
    angle = torch.linspace(0.0, 1.5, shape[0], device=device)
    return {
        "pred": randn(shape, dtype, device, 1),
        "x0": randn(shape, dtype, device, 0),
        "x0_coef": torch.where(angle == 0, 1.0, -angle.sin()),
        "eps_coef": torch.where(angle == 0, 0.0, angle.cos()),
        "weight": torch.linspace(0.25, 4.0, shape[0], device=device),
        **draws(shape[0], device),
    }


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
    ),
}
