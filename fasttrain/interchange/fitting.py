"""A source beside the model that is to begin from it, and the plan that comes of it: a row for each of the model's parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.init_from import InitFrom
from fasttrain.interchange.source import Source

How = Literal["taken", "resized", "copied", "fresh"]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Row:
    """What becomes of one of the model's parameters.

    Attributes:
        was: the shape of what it comes from; None where it is made anew.
        why: in words, where it is not simply taken.
        make: its values, fp32; None where it stays as the model's own start made it.
    """

    name: str
    how: How
    shape: Shape
    was: Shape | None = None
    why: str = ""
    make: Callable[[], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What a model begins with: a row a parameter; what of the source is not used, and why; and what a user should know."""

    rows: tuple[Row, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Fitting:
    """A source beside a model.

    Attributes:
        model: fields of the model's config, with its registered name.
        shapes: of its trained parameters.
        diffusion: its schedule and target, as plain data.
        data: what it will train on, as `source.of_data` tells it.
        used: names of the source's tensors that rows are made of.
    """

    source: Source
    model: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    diffusion: Mapping[str, Any]
    data: Mapping[str, Any]
    asked: InitFrom
    used: set[str] = field(default_factory=set)

    def was(self, name: str) -> Shape | None:
        """The shape of the source's tensor of this name; None where it has none."""
        return self.source.tensors.shapes.get(name)

    def taken(self, name: str) -> Row:
        """The source's tensor of this name, as it is.

        Raises:
            UserError: it has none of this shape.
        """
        shape, was = self.shapes[name], self.was(name)
        if was != shape:
            raise UserError(
                f"init_from: {name} is {list(was) if was is not None else 'absent'} in {self.source.told} and {list(shape)} in this model, "
                "and no difference between their configs explains it: give this config the model of the source, or name another source"
            )
        return self.made(name, "taken", lambda: self.source.tensors.read(name))

    def made(self, name: str, how: How, make: Callable[[], Tensor], why: str = "", of: str | None = None) -> Row:
        """A row made of the source's tensor `of`, by default the one of the same name."""
        self.used.add(of or name)
        return Row(name, how, self.shapes[name], self.was(of or name), why, make)

    def fresh(self, name: str, why: str) -> Row:
        """A parameter that stays as the model's own start made it."""
        return Row(name, "fresh", self.shapes[name], None, why)

    def differs(self, key: str) -> bool:
        """Whether a field of the model's config is known of the source, and is another here."""
        return key in self.source.model and key in self.model and self.source.model[key] != self.model[key]
