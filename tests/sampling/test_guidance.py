"""Guidance: formulas by hand, one call of the evaluations that count, all channels, limits and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.cond import Cond, Nothing, Text
from fasttrain.errors import UserError
from fasttrain.sampling.guidance import Guidance, guided, read_guidance

NULL, T = 10, 1000
EVERYTHING = Nothing(NULL, controls=True)


class Told:
    """Adds its label and, where they count, its controls to every channel, and keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.batches.append(len(x_t))
        told = cond.labels.double()
        if cond.controls is not None:
            controls = cond.controls.sum(dim=1)
            told = told + (controls if cond.controlled is None else controls.where(cond.controlled, 0))
        return x_t * t[:, None, None, None] + told[:, None, None, None]


def inputs(controls: bool = False) -> tuple[Tensor, Tensor, Cond]:
    x_t, t = torch.arange(24.0).reshape(2, 3, 2, 2), torch.tensor([500, 500])
    return x_t, t, Cond(torch.tensor([4, 7]), controls=torch.tensor([[100.0, 20.0], [300.0, 0.0]]) if controls else None)


def led(guidance: Guidance, nothing: Nothing, controls: bool = False, t: int = 500) -> tuple[list[float], list[int]]:
    """What guidance makes of the labels (and controls), per sample, and the batches that the model was called with."""
    model, (x_t, _, cond) = Told(), inputs(controls)
    timesteps = torch.full((2,), t)
    made = guided(model, guidance, nothing, T)(x_t, timesteps, cond) - x_t * t
    assert torch.allclose(made, made[:, :1, :1, :1].double(), rtol=1e-12), "every channel is led alike"
    return [round(value, 9) for value in made[:, 0, 0, 0].tolist()], model.batches


@pytest.mark.parametrize(("scale", "by_hand"), [(1.5, [1.0, 5.5]), (4.0, [-14.0, -2.0]), (0.5, [7.0, 8.5])])
def test_classifier_free_guidance_by_hand(scale: float, by_hand: list[float]) -> None:
    """lambda 4 + (1 - lambda) 10, e.g. 6 - 5 = 1; and 7."""
    assert led(Guidance(scale), Nothing(NULL)) == (by_hand, [4])


def test_guidance_by_controls_and_semantics_by_hand() -> None:
    """2 [1.5 (4 + 120) + (1 - 1.5) 4] + (1 - 2) 10 = 358, and 2 [1.5 307 - 0.5 7] - 10 = 904: three evaluations, one call."""
    assert led(Guidance(2.0, controls=1.5), EVERYTHING, controls=True) == ([358.0, 904.0], [6])


@pytest.mark.parametrize(
    ("guidance", "by_hand", "evaluations"),
    [
        (Guidance(1.0, 1.0), [124.0, 307.0], 1),
        (Guidance(1.0, 0.0), [4.0, 7.0], 1),  # the controls left out
        (Guidance(0.0, 1.0), [10.0, 10.0], 1),  # everything left out
        (Guidance(1.0, 1.5), [184.0, 457.0], 2),  # 1.5 124 - 0.5 4
        (Guidance(2.0, 1.0), [238.0, 604.0], 2),  # 2 124 - 10
        (Guidance(2.0, 0.0), [-2.0, 4.0], 2),  # 2 4 - 10
    ],
)
def test_limits_take_only_the_evaluations_that_count(guidance: Guidance, by_hand: list[float], evaluations: int) -> None:
    assert led(guidance, EVERYTHING, controls=True) == (by_hand, [2 * evaluations])


def test_a_model_never_trained_without_controls_keeps_them() -> None:
    """2 (4 + 120) - (10 + 120)."""
    assert led(Guidance(2.0), Nothing(NULL), controls=True) == ([118.0, 304.0], [4])


@pytest.mark.parametrize(("resolution", "strength"), [(1.0, 1.5), (2.0, 2.0), (4.0, 3.0)])
def test_the_resolution_law_by_hand(resolution: float, strength: float) -> None:
    """1 + s (lambda - 1): 1.5 at 256 pixels is 2 at 512, as the paper's figure 7 finds."""
    law = Guidance(1.5, resolution=resolution)
    assert law.strength == strength and led(law, Nothing(NULL)) == led(Guidance(strength), Nothing(NULL))
    assert Guidance(1.0, resolution=resolution).strength == 1.0


@pytest.mark.parametrize(("t", "on"), [(0, False), (199, False), (200, True), (500, True), (800, True), (801, False), (999, False)])
def test_outside_its_interval_the_model_is_asked_once_and_left_as_it_is(t: int, on: bool) -> None:
    guidance = Guidance(2.0, controls=1.5, interval=(0.2, 0.8))
    plain = [124.0, 307.0]
    assert led(guidance, EVERYTHING, controls=True, t=t) == (([358.0, 904.0], [6]) if on else (plain, [2]))


def test_the_caption_is_left_out_like_the_class() -> None:
    def text(value: float, count: int) -> Text:
        return Text(torch.full((count, 3, 2), value), torch.full((count,), 3), torch.full((count, 2), value))

    def model(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x_t * 0 + cond.text.tokens.mean(dim=(1, 2))[:, None, None, None] + cond.text.pooled[:, :1, None, None]

    x_t, t, _ = inputs()
    got = guided(model, Guidance(3.0), Nothing(text=text(1.0, 1)), T)(x_t, t, Cond(text=text(5.0, 2)))
    assert got.unique().tolist() == [3 * 10.0 - 2 * 2.0]


def test_nothing_to_lead_is_the_model_itself() -> None:
    model = Told()
    assert guided(model, Guidance(), Nothing(), T) is model
    assert guided(model, Guidance(interval=(0.1, 0.2), resolution=2.0), EVERYTHING, T) is model


def test_what_the_model_cannot_leave_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"guidance 1\.5 needs .* set guidance to 1"):
        guided(Told(), Guidance(1.5), Nothing(controls=True), T)
    with pytest.raises(UserError, match=r"control guidance 1\.375 needs .*control_drop > 0: set it to 1"):
        guided(Told(), Guidance(controls=1.375), Nothing(NULL), T)


@pytest.mark.parametrize(
    ("given", "guidance"),
    [
        (4, Guidance(4.0)),
        ({"scale": 1.5, "controls": 1.375}, Guidance(1.5, 1.375)),
        ({"interval": [0.2, 0.8]}, Guidance(interval=(0.2, 0.8))),
        (Guidance(2.0), Guidance(2.0)),
    ],
)
def test_a_number_or_a_mapping_is_read_and_written_back(given: Any, guidance: Guidance) -> None:
    made = read_guidance(given)
    assert made == guidance and read_guidance(made.plain()) == made
    assert isinstance(made.plain(), float) == (made == Guidance(made.scale))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 1.5}, "guidance has no parameter 'beta'; .*controls"),
        ({"interval": [0.8, 0.2]}, "the smaller first"),
        ({"interval": [0, 1.5]}, "two fractions of T"),
        ({"interval": 0.5}, "interval"),
        (-1, r"scale must lie in \[0, 1000\]"),
        (float("nan"), "scale must lie"),
        ("strong", "scale: .*number.*got 'strong'"),
        ({"resolution": 0}, "resolution must be positive"),
        ({"controls": 1e9}, "controls must lie"),
    ],
)
def test_impossible_guidance_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_guidance(given)
