"""Guidance: leading a model's output away from what it would be without its conditions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError
from torch import Tensor

from fasttrain.cond import Cond, Nothing, concatenated
from fasttrain.errors import UserError
from fasttrain.registry import nearest, shown
from fasttrain.sampling.sampler import Model

FURTHEST = 1000.0  # beyond any use


@dataclass(frozen=True)
class Guidance:
    """How strongly semantics s (class or text) and controls c lead, where, and for images of which size. 0 stands for "left out".

    F = lambda' [beta F(c, s) + (1 - beta) F(0, s)] + (1 - lambda') F(0, 0)                       [Berrada et al. 2024, Eq. 2]
    lambda' = 1 + r (lambda - 1)                                                                   [Berrada et al. 2024, Eq. 4]

    At beta = 1 this is classifier-free guidance [Ho and Salimans 2022, Eq. 6]. A model that was never trained without its controls keeps
    them throughout.

    Args:
        scale: lambda; 1 is none.
        controls: beta; 1 is none.
        interval: first and last t / T at which there is any guidance at all [Kynkaanniemi et al. 2024, Eq. 6].
        resolution: r, how many times larger the images are than those for which `scale` was found best.

    Raises:
        ValueError: a value that cannot be meant.
    """

    scale: float = 1.0
    controls: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    resolution: float = 1.0

    def __post_init__(self) -> None:
        for key in ("scale", "controls"):
            if not 0 <= getattr(self, key) <= FURTHEST:
                raise ValueError(f"{key} must lie in [0, {FURTHEST:g}], got {getattr(self, key)}")
        if not 0 < self.resolution <= FURTHEST:
            raise ValueError(f"resolution must be positive and at most {FURTHEST:g}, got {self.resolution}")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"interval must be two fractions of T in [0, 1], the smaller first, got {list(self.interval)}")

    @property
    def strength(self) -> float:
        """lambda', the scale that is applied."""
        return 1 + self.resolution * (self.scale - 1)

    def plain(self) -> float | dict[str, Any]:
        """What a config says of it: its scale alone where that is all."""
        return self.scale if self == Guidance(self.scale) else {**asdict(self), "interval": list(self.interval)}


def read_guidance(given: Any) -> Guidance:
    """A guidance from a config: a number is its scale.

    Raises:
        ValueError: unknown parameters, with the nearest known one, or values that cannot be.
    """
    if isinstance(given, Guidance):
        return given
    if isinstance(given, Mapping):
        known = list(Guidance.__dataclass_fields__)
        for key in given:
            if key not in known:
                raise ValueError(f"guidance has no parameter {shown(key)}; {nearest(key, known)}")
    params = dict(given) if isinstance(given, Mapping) else {"scale": given}
    try:
        return TypeAdapter(Guidance).validate_python(params)
    except ValidationError as error:
        told = "; ".join(": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors())
        raise ValueError(f"{told} (got {shown(given)})") from None


GuidanceChoice = Annotated[Guidance, PlainValidator(read_guidance), PlainSerializer(Guidance.plain)]
"""The type of a config's key `guidance`."""


def guided(model: Model, guidance: Guidance, nothing: Nothing, num_timesteps: int) -> Model:
    """A model whose output is led, on all channels; the formula is `Guidance`'s.

    At a given x_t, x0 is an affine function of any target and the weights add up to 1, so guiding the output is guiding x0. The
    evaluations that count are one batched call. Where nothing is led, the model itself is returned. A limited interval waits for the
    device once a call, to know the time.

    Args:
        model: (x_t [B, C, H, W], t [B], cond) -> [B, C, H, W]; t is the same for the whole batch.
        nothing: what the model is told where something is left out; `controls`: whether it was trained without them.
        num_timesteps: T.

    Raises:
        UserError: guidance by what the model cannot leave out.
    """
    _require_possible(guidance, nothing)
    strength, beta = guidance.strength, guidance.controls
    told = (_Told(strength * beta), _Told(strength * (1 - beta), controls=False), _Told(1 - strength, controls=False, semantics=False))
    parts = [part for part in told if part.weight]
    if parts == [_Told(1.0)]:
        return model
    first, last = guidance.interval
    limited = guidance.interval != (0, 1)

    def led(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if limited and not first <= t[0].item() / num_timesteps <= last:
            return model(x_t, t, cond)
        conds = concatenated([part.of(cond, nothing, torch.ones_like(t, dtype=torch.bool)) for part in parts])
        outputs = model(torch.cat([x_t] * len(parts)), torch.cat([t] * len(parts)), conds).chunk(len(parts))
        return torch.stack([part.weight * output.double() for part, output in zip(parts, outputs, strict=True)]).sum(dim=0)

    return led


class _Told(NamedTuple):
    """One evaluation: its weight, and whether the model is told the controls and the semantics."""

    weight: float
    controls: bool = True
    semantics: bool = True

    def of(self, cond: Cond, nothing: Nothing, everyone: Tensor) -> Cond:
        """What the model is told of a batch; `everyone` is [B] True."""
        if cond.controls is not None and cond.controlled is None:
            cond = replace(cond, controlled=everyone)  # said of every part, or they could not be one batch
        if not self.controls and nothing.controls:
            cond = nothing.instead_of_controls(cond, everyone)
        return cond if self.semantics else nothing.instead_of_semantics(cond, everyone)


def _require_possible(guidance: Guidance, nothing: Nothing) -> None:
    if guidance.scale != 1 and not nothing.has_semantics:
        raise UserError(f"guidance {guidance.scale} needs a model of classes or text, trained with label_drop > 0: set guidance to 1")
    if guidance.controls != 1 and not nothing.controls:
        raise UserError(
            f"control guidance {guidance.controls} needs a model with controls, trained with diffusion.control_drop > 0: set it to 1"
        )
