"""What a set's text was made of: the same images may come again with other captions or labels, and then have another text."""

import json
from collections.abc import Sequence
from typing import Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from fasttrain.data.index import DIGEST, Index


class MadeOf(BaseModel):
    """What of a set decided its text: its captions or, where it has none or others were asked for, its classes.

    Attributes:
        of_names: a template or class names were given.
        captions_xxh3: of the set's captions, as its index has it; None where captions of its classes were made.
        classes_xxh3: of the set's labels and classes' names; None where its own captions were taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    of_names: bool
    captions_xxh3: str | None = Field(default=None, pattern=DIGEST)
    classes_xxh3: str | None = Field(default=None, pattern=DIGEST)

    @classmethod
    def of(cls, captions_xxh3: str | None, labels_xxh3: str, classes: Sequence[str], of_names: bool) -> Self:
        """Of a set with these captions (None: it has none), labels and classes."""
        if captions_xxh3 is not None and not of_names:
            return cls(of_names=False, captions_xxh3=captions_xxh3)
        told = json.dumps([labels_xxh3, *classes])
        return cls(of_names=of_names, classes_xxh3=xxhash.xxh3_128_hexdigest(told.encode()))

    def changed(self, index: Index) -> str | None:
        """What of the set is another now, in words; None where it is as it was."""
        now = self.of(index.captions_xxh3, index.labels_xxh3, index.classes, self.of_names)
        if now == self:
            return None
        if now.captions_xxh3 is not None and self.captions_xxh3 is None:
            return "the set has captions now, and had none"
        return "the set has other captions now" if self.captions_xxh3 is not None else "the set has other labels or classes now"
