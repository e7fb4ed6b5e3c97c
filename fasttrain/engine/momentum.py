"""Momentum that decays over a run, and the learning rate that makes up for it: Demon and MDLRC, as numbers of each update."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from fasttrain.registry import nearest, shown

SHAPES = ("constant", "cosine", "linear")


class Demon(BaseModel):
    """beta1 from its start to `floor` over a run, in Demon's shape [Chen et al. 2022, "Demon", Eq. 2; Xu et al. 2024, Eq. 9].

    beta_k = max(floor, beta_0 r / ((1 - beta_0) + beta_0 r)),  r = 1 - (k - 1) / steps,  of update k = 1, 2, ...

    In a sum of gradients with momentum beta, all that a gradient still adds to later updates is beta / (1 - beta) times what it adds to
    its own: that is what falls linearly, from beta_0 / (1 - beta_0) to 0.

    `floor` is the paper's lower limit, whose number is not in our copy; 0 is Demon as published. `steps` null: those of the run, filled in
    when it begins. A run that is made longer later on goes on by what was planned then, unless `steps` are given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Literal["demon"] = "demon"
    floor: float = Field(default=0.0, ge=0, lt=1)
    steps: int | None = Field(default=None, gt=0, le=10**12)

    def beta(self, start: float, update: int, steps: int) -> float:
        """beta1 of update 1, 2, ...; `steps` where none are given here."""
        left = max(0.0, 1 - (update - 1) / (self.steps or steps))
        return max(self.floor, start * left / ((1 - start) + start * left))

    def compensation(self, start: float, update: int, steps: int) -> float:
        """The factor of the learning rate, (1 - beta_0) / (1 - beta_k): see `MomentumDecay`."""
        return (1 - start) / (1 - self.beta(start, update, steps))


def read_decay(given: Any) -> "str | Demon":
    """`optimizer.decay` of a config: a shape's name, or demon with its parameters.

    Raises:
        ValueError: an unknown shape, with the nearest known one, or parameter.
    """
    if isinstance(given, Demon) or (isinstance(given, str) and given in SHAPES):
        return given
    given = given if isinstance(given, Mapping) else {"name": given}
    if given.get("name") != "demon":
        raise ValueError(f"unknown decay {shown(given.get('name'))}; {nearest(given.get('name'), (*SHAPES, 'demon'))}")
    try:
        return Demon.model_validate(given)
    except ValidationError as error:
        raise ValueError("; ".join(": ".join([*map(str, e["loc"]), e["msg"]]) for e in error.errors())) from None


Decay = Annotated[
    str | Demon, PlainValidator(read_decay), PlainSerializer(lambda decay: decay if isinstance(decay, str) else decay.model_dump())
]
"""The type of a config's key `optimizer.decay`."""


class MomentumDecay(Demon):
    """MDLRC: momentum that decays, with the learning rate compensated so that the newest gradient counts as much as ever.

    m_k = beta_k m_(k-1) + (1 - beta_k) g_k,  p_k = p_(k-1) - lr_k m_k / (c_k sqrt(v)):  update k moves the weights by lr_k (1 - beta_k)
    times its own gradient, and their average ema_k = d ema_(k-1) + (1 - d) p_k takes (1 - d) of that. As beta falls, 1 - beta grows, from
    0.1 to 1 at beta_0 = 0.9: the newest gradient would weigh ten times more in the weights and in the average. It weighs the same for

        lr_k (1 - beta_k) = lr (1 - beta_0),  so  lr_k = lr (1 - beta_0) / (1 - beta_k)                          [Xu et al. 2024, Eq. 10]

    What a gradient moves the weights by in all, over the updates after its own too, is about lr_k and so falls with it, to a tenth: the
    compensation is itself a decay of the learning rate. `optimizer.decay: demon` is that decay alone, to compare with.

    Adam's m begins at 0; with a constant gradient g, m_k = (1 - prod_(i<=k) beta_i) g by induction, since beta (1 - P) + (1 - beta) =
    1 - beta P. So its bias correction is c_k = 1 - prod_(i<=k) beta_i, which is 1 - beta^k where beta is constant.

    `compensate: false` is Demon alone.
    """

    compensate: bool = True


class Momentum(NamedTuple):
    """What an update needs to know."""

    beta1: float
    product: float | None  # of every update's beta1 so far; None: beta1^update, of a constant one
    compensation: float  # factor of the learning rate


class Momenta:
    """The momentum of every update of a run: a function of the update's number alone, whatever was asked before.

    Args:
        start: beta_0.
        decay: with `steps` given; None: beta1 is constant.
    """

    def __init__(self, start: float, decay: MomentumDecay | None):
        self._start, self._decay = start, decay
        self._known = (0, 1.0)  # an update, and the product up to it

    def of(self, update: int) -> Momentum:
        """Of update 1, 2, ... The product is multiplied in the order of the updates: a resumed run finds the same bits."""
        decay, start = self._decay, self._start
        if decay is None:
            return Momentum(start, None, 1.0)
        assert decay.steps is not None
        done, product = self._known if self._known[0] <= update else (0, 1.0)
        product = math.prod((decay.beta(start, k, decay.steps) for k in range(done + 1, update + 1)), start=product)
        self._known = (update, product)
        compensation = decay.compensation(start, update, decay.steps) if decay.compensate else 1.0
        return Momentum(decay.beta(start, update, decay.steps), product, compensation)
