"""What a model is told about each sample beside its noisy latents, and what it is told where that is left out.

Semantics (class or text) say what the image shows, controls (original size, crop, flip ...) how it was made. Guidance needs predictions
without either, so training leaves them out now and then: `Nothing` is what stands in their place.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CONTROLS: dict[str, tuple[str, ...]] = {"size": ("height", "width"), "crop": ("top", "left"), "flip": ("flip",), "aspect": ("aspect",)}
"""The numbers of each control: pixels of the original image, pixels cut off above and to the left, 0 or 1, 100 log2(width / height)."""


def control_columns(controls: Iterable[str]) -> tuple[str, ...]:
    """The columns of `Cond.controls` for these controls; their order is that of CONTROLS, whatever order they are named in."""
    named = set(controls)
    return tuple(column for control, columns in CONTROLS.items() if control in named for column in columns)


@dataclass(frozen=True, eq=False)
class Text:
    """Captions as a text encoder gave them.

    Attributes:
        tokens: [B, M, E], any float dtype; places from `length` on are zeros until they are padded.
        length: [B] int64, the caption's own tokens.
        pooled: [B, P], one vector a caption.
    """

    tokens: Tensor
    length: Tensor
    pooled: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Text":
        """The same with every tensor changed."""
        return Text(change(self.tokens), change(self.length), change(self.pooled))


@dataclass(frozen=True, eq=False)
class Cond:
    """The conditions of a batch; a part is None where there is none. The first dimension of all is B.

    Attributes:
        labels: [B] int64, classes.
        text: captions.
        controls: [B, K] fp32, the columns of the model's controls as `control_columns` orders them.
        controlled: [B] bool, where the controls count; None: everywhere.
    """

    labels: Tensor | None = None
    text: Text | None = None
    controls: Tensor | None = None
    controlled: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> "Cond":
        """Of some samples of the batch."""
        return self.map(lambda part: part[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Cond":
        """The same with every tensor changed, e.g. moved to a device."""
        return Cond(
            labels=None if self.labels is None else change(self.labels),
            text=None if self.text is None else self.text.map(change),
            controls=None if self.controls is None else change(self.controls),
            controlled=None if self.controlled is None else change(self.controlled),
        )


def concatenated(conds: Sequence[Cond]) -> Cond:
    """Conditions of batches after each other, as one batch; all have the same parts."""
    labels, text, controls, controlled = ([getattr(cond, part) for cond in conds] for part in ("labels", "text", "controls", "controlled"))
    return Cond(
        labels=None if labels[0] is None else torch.cat(labels),
        text=None if text[0] is None else Text(*(torch.cat([getattr(t, part) for t in text]) for part in ("tokens", "length", "pooled"))),
        controls=None if controls[0] is None else torch.cat(controls),
        controlled=None if controlled[0] is None else torch.cat(controlled),
    )


@dataclass(frozen=True, eq=False)
class Nothing:
    """What stands for "no class", "no caption" and "no controls".

    Attributes:
        label: the model's label for no class; None where it has no classes.
        text: the empty caption, B = 1; None where the model takes no text.
        controls: whether the model can do without its controls.
    """

    label: int | None = None
    text: Text | None = None
    controls: bool = False

    @property
    def has_semantics(self) -> bool:
        """Whether there is anything to leave out of class or text."""
        return self.label is not None or self.text is not None

    def instead_of_semantics(self, cond: Cond, where: Tensor) -> Cond:
        """`cond` without class and text where `where` [B] bool says so."""
        labels, text = cond.labels, cond.text
        if labels is not None and self.label is not None:
            labels = labels.masked_fill(where, self.label)
        if text is not None and self.text is not None:
            pairs = zip((text.tokens, text.length, text.pooled), (self.text.tokens, self.text.length, self.text.pooled), strict=True)
            text = Text(*(torch.where(where.reshape(-1, *[1] * (own.dim() - 1)), none.to(own.dtype), own) for own, none in pairs))
        return replace(cond, labels=labels, text=text)

    def instead_of_controls(self, cond: Cond, where: Tensor) -> Cond:
        """`cond` without its controls where `where` [B] bool says so."""
        if cond.controls is None:
            return cond
        return replace(cond, controlled=~where if cond.controlled is None else cond.controlled & ~where)
