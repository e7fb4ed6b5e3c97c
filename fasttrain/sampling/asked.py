"""What each numbered sample is asked to show: classes and prompts by turns, and the same controls for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash
from torch import Tensor

from fasttrain.cond import Cond, Text
from fasttrain.errors import UserError

Pad = Callable[[Text, Tensor], Text]
"""(captions of B, their samples' numbers [B]) -> the same as the model takes them."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The conditions of sample i, a function of i alone.

    Args:
        labels: [L] int64, on the device; sample i is of class labels[i % L].
        prompts: P captions as their encoder gave them, on the device; sample i is of prompt i % P. None for a model without text.
        captions: the P prompts in words.
        pad: what stands behind a prompt's own tokens: training's padding, drawn by the sample's number.
        controls: [K] fp32, on the device; None for a model without controls.
    """

    labels: Tensor
    prompts: Text | None = None
    captions: tuple[str, ...] = ()
    pad: Pad = lambda text, numbers: text
    controls: Tensor | None = None

    def __call__(self, numbers: Tensor) -> Cond:
        """The conditions of these samples [B], int64 on the device."""
        text = None
        if self.prompts is not None:
            turn = numbers % len(self.captions)
            text = self.pad(self.prompts.map(lambda part: part[turn]), numbers)
        controls = None if self.controls is None else self.controls.expand(len(numbers), -1)
        return Cond(labels=self.labels[numbers % len(self.labels)], text=text, controls=controls)

    def caption(self, number: int) -> str:
        """The prompt of a sample, in words."""
        return self.captions[number % len(self.captions)]

    def described(self) -> dict[str, Any]:
        """What a score's protocol keeps of it."""
        if self.prompts is None:
            told: dict[str, Any] = {"classes": len(self.labels)}
        else:
            told = {"captions": len(self.captions), "captions_xxh3": xxhash.xxh3_128_hexdigest("\n".join(self.captions).encode())}
        return told if self.controls is None else {**told, "controls": self.controls.tolist()}


def check_labels(labels: list[int], num_classes: int) -> None:
    """Raises UserError where a class does not exist; an unconditional model has only 0."""
    known = max(num_classes, 1)
    if min(labels) < 0 or max(labels) >= known:
        raise UserError(f"class labels must lie in [0, {known}), got {min(labels)} to {max(labels)}")
