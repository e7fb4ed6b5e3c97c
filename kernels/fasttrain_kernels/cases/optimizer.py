"""The case of the optimizer's update, made functional: it works on copies, and returns the new state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.adamw_ema import adamw_ema, adamw_ema_reference
from fasttrain_kernels.cases.case import Case, Inputs, Shape, randn

_SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "update": 3, "decays": (0.9,)}


def adamw_ema_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The state of `shape` after some updates, fp32; a gradient of `dtype`; weights of `dtype` that hold NaN until they are written."""
    names = ("param", "exp_avg", "exp_avg_sq", "ema")
    state = {name: randn(shape, torch.float32, device, i) for i, name in enumerate(names, 1)}
    state["exp_avg_sq"] = state["exp_avg_sq"].square()
    weight = torch.full(shape, float("nan"), dtype=dtype, device=device)
    clip = torch.tensor(0.7, device=device)
    return {"grad": randn(shape, dtype, device, 0), **state, "weight": weight, "clip": clip}


def functional(update: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """`update`, which is `adamw_ema` or its reference, on copies: over one tensor, or over the list of its first dimension's entries."""

    def call(
        *, grad: Tensor, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, weight: Tensor, clip: Tensor, **others: Any
    ) -> tuple[Tensor, ...]:
        as_list = others.pop("form") == "list"
        states = [_copy(t) for t in (param, exp_avg, exp_avg_sq, weight, ema)]

        def split(t: Tensor) -> list[Tensor]:
            return list(t) if as_list else [t]

        p, m, v, w, average = map(split, states)
        update(p, split(grad), m, v, [average], weights=w, clip=clip, **_SETTINGS, **others)
        return tuple(states)

    return call


def _copy(t: Tensor) -> Tensor:
    """With the same strides, gaps between elements included."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


OPTIMIZER_CASES: dict[str, Case] = {
    "adamw_ema": Case(
        reference=functional(adamw_ema_reference),
        call=functional(adamw_ema),
        inputs=adamw_ema_inputs,
        differentiable=(),
        shapes=((5, 33), (2, 1536), (1, 1152), (3, 33_000), (1, 1), (2, 0), (0, 8)),
        sample=(4608,),
        real=((262_144,),),
        minimum=(36, 0),
        options=({"form": "one"}, {"form": "list"}),
    )
}
