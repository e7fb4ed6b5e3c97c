"""Classifier-free guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from fasttrain.cond import Cond, Nothing, concatenated
from fasttrain.errors import UserError

Model = Callable[[Tensor, Tensor, Cond], Tensor]


def guided(model: Model, scale: float, nothing: Nothing) -> Model:
    """A model whose output is led away from the unconditional one, on all channels.

    F = F_u + s (F_c - F_u)          [Ho and Salimans 2022, Eq. 6, with s = 1 + w]

    At a given x_t, x0 is an affine function of any target, so guiding the output is guiding x0. Both halves are one batched call;
    at scale 1 the model itself is returned and nothing is computed twice.

    Args:
        model: (x_t [B, C, H, W], t [B], cond) -> [B, C, H, W].
        scale: s; 1 is no guidance.
        nothing: what the model is told instead of a class or a caption.

    Raises:
        UserError: guidance of a model that has no class or text to leave out.
    """
    if scale == 1:
        return model
    if not nothing.has_semantics:
        raise UserError(f"guidance {scale} needs a model of classes or text, trained with label_drop > 0: set guidance to 1")

    def both(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        without = nothing.instead_of_semantics(cond, torch.ones_like(t, dtype=torch.bool))
        conditional, unconditional = model(torch.cat([x_t, x_t]), torch.cat([t, t]), concatenated([cond, without])).chunk(2)
        return torch.lerp(unconditional.double(), conditional.double(), scale)

    return both
