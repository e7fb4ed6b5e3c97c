"""Classifier-free guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from fasttrain.errors import UserError

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided(model: Model, scale: float, null_label: int | None) -> Model:
    """A model whose output is led away from the unconditional one, on all channels.

    F = F_u + s (F_c - F_u)          [Ho and Salimans 2022, Eq. 6, with s = 1 + w]

    At a given x_t, x0 is an affine function of any target, so guiding the output is guiding x0. Both halves are one batched call;
    at scale 1 the model itself is returned and nothing is computed twice.

    Args:
        model: (x_t [B, C, H, W], t [B], labels [B]) -> [B, C, H, W].
        scale: s; 1 is no guidance.
        null_label: the model's label for "no class".

    Raises:
        UserError: guidance of a model without a null label.
    """
    if scale == 1:
        return model
    if null_label is None:
        raise UserError(f"guidance {scale} needs a class-conditional model trained with label_drop > 0: set guidance to 1")

    def both(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        all_labels = torch.cat([labels, torch.full_like(labels, null_label)])
        conditional, unconditional = model(torch.cat([x_t, x_t]), torch.cat([t, t]), all_labels).chunk(2)
        return torch.lerp(unconditional.double(), conditional.double(), scale)

    return both
