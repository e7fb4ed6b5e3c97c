"""Classifier-free guidance: formula, one call, all channels, nothing computed at scale 1."""

import pytest
import torch
from torch import Tensor

from fasttrain.cond import Cond, Nothing
from fasttrain.errors import UserError
from fasttrain.sampling.guidance import guided

NULL = 10


class Labelled:
    """Adds its label to every channel, and counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.batches.append(len(x_t))
        return x_t * t[:, None, None, None] + cond.labels[:, None, None, None]


def inputs() -> tuple[Tensor, Tensor, Cond]:
    return torch.arange(24.0).reshape(2, 3, 2, 2), torch.tensor([2, 5]), Cond(torch.tensor([4, 7]))


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_every_channel_is_guided_in_one_call(scale: float) -> None:
    model, (x_t, t, cond) = Labelled(), inputs()
    conditional, unconditional = Labelled()(x_t, t, cond), Labelled()(x_t, t, Cond(torch.full((2,), NULL)))
    got = guided(model, scale, Nothing(NULL))(x_t, t, cond)
    torch.testing.assert_close(got, (unconditional + scale * (conditional - unconditional)).double(), rtol=1e-14, atol=0)
    assert model.batches == [4]


def test_scale_one_is_the_model_itself() -> None:
    model = Labelled()
    assert guided(model, 1.0, Nothing()) is model


def test_a_model_without_null_label_is_refused() -> None:
    with pytest.raises(UserError, match=r"guidance 1\.5 needs .* set guidance to 1"):
        guided(Labelled(), 1.5, Nothing())
