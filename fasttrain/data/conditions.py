"""What a model is told beside each image: labels, captions and controls, found on the host with the samples and made a Cond on the device.

Everything is a function of the sample, and of (seed, position) where it is drawn: a crop, a flip, the noise of padded text. A sample that
stands in for an unreadable one brings its own text and facts. Only what a run asks for is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform
from torch import Tensor

from fasttrain.cond import Cond, Text
from fasttrain.data.facts import Seen, control_numbers, impossible, needed, require_recorded
from fasttrain.data.shards import ShardSet
from fasttrain.data.text.padding import TextPadding, padded
from fasttrain.data.text.table import TextTable
from fasttrain.errors import UserError

_TEXT = ("tokens", "length", "pooled")


@dataclass(frozen=True)
class Captions:
    """The captions of a set, padded as the run says; `seed` [] int64 of the run, on the device; `impl` of the operation `text_padding`."""

    table: TextTable
    padding: TextPadding
    seed: Tensor
    impl: str = "auto"

    def gather(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """As stored, by the names of Text's parts."""
        return dict(zip(_TEXT, self.table.gather(ids), strict=True))

    def finish(self, arrays: Mapping[str, Tensor], position: Tensor) -> Text:
        """Padded, on the device."""
        return padded(Text(*(arrays[name] for name in _TEXT)), self.seed, position, self.padding, self.impl)


class Controls:
    """The controls of a set's samples.

    Args:
        shards: the set.
        controls: names of `cond.CONTROLS`.
        size: side of the square that the model sees, pixels before an autoencoder.
        flip: whether half of the visits are mirrored.
        seed: [] int64 of the run, on the device.
        impl: of the operation `uniform`, which draws the flips.

    Raises:
        UserError: what they need was not recorded, or is damaged.
    """

    def __init__(self, shards: ShardSet, controls: Iterable[str], size: int, flip: bool, seed: Tensor, impl: str = "auto"):
        self.controls = tuple(controls)
        require_recorded(self.controls, shards.index, shards.files.place)
        self._facts = shards.facts(needed(self.controls))
        self._pixels, self._size, self._place, self._samples = shards.index.pixels, size, shards.files.place, len(shards)
        self._flip, self._seed, self._impl = flip, seed, impl

    def gather(self, ids: np.ndarray, box: np.ndarray | None) -> dict[str, np.ndarray]:
        """The numbers of the plain view, and of the mirrored one where there is one: fp32 [n, views, K].

        Args:
            ids: int64 [n].
            box: what the model sees of the stored squares, int64 [n, 3]: side, top and left; None: all.

        Raises:
            UserError: a control is made of a fact that is not known of one of the samples, or cannot be.
        """
        facts = {name: column[ids].astype(np.float64) for name, column in self._facts.items()}
        self._require_possible(ids, facts)
        box = np.array([[self._pixels, 0, 0]]).repeat(len(ids), 0) if box is None else box
        views = (False, True) if self._flip else (False,)
        seen = [Seen(facts, self._pixels, self._size, box, mirrored) for mirrored in views]
        return {"controls": np.stack([control_numbers(self.controls, each) for each in seen], axis=1)}

    def _require_possible(self, ids: np.ndarray, facts: Mapping[str, np.ndarray]) -> None:
        """Looks at the samples that are used, since an image that cannot be read at all has a substitute; counts those of the set."""
        wrong = impossible(facts)
        if not wrong.any():
            return
        found = ", ".join(f"{name} {values[wrong][0]:g}" for name, values in facts.items())
        made = [control for control in self.controls if impossible({name: facts[name] for name in needed([control])}).any()]
        raise UserError(
            f"{self._place}: what is recorded of sample {ids[wrong][0]} is not that of an image ({found}), and so with "
            f"{impossible(self._facts).sum():,} of {self._samples:,} samples; model.controls {', '.join(made)} need it: leave them out, "
            "or prepare the set anew with `fasttrain prepare images` or `latents`"
        )

    def finish(self, arrays: Mapping[str, Tensor], position: Tensor) -> Tensor:
        """fp32 [B, K], of the view that the flip draws: the same draw as the image's."""
        views = arrays["controls"]
        if not self._flip:
            return views[:, 0]
        mirrored = uniform(self._seed, position, Purpose.FLIP, impl=self._impl) < 0.5
        return views[:, 1].where(mirrored[:, None], views[:, 0])


@dataclass(frozen=True)
class Conditions:
    """All conditions of a loader's samples; labels alone where neither captions nor controls are given."""

    captions: Captions | None = None
    controls: Controls | None = None

    def gather(self, ids: np.ndarray, box: np.ndarray | None) -> dict[str, np.ndarray]:
        """What is needed beside the labels of samples `ids` [n], on the host, by name."""
        text = {} if self.captions is None else self.captions.gather(ids)
        return text if self.controls is None else {**text, **self.controls.gather(ids, box)}

    def ahead(self, spans: Sequence[tuple[int, int]]) -> None:
        """Says whose text is wanted next, as first sample_ids and those behind the last; returns at once."""
        if self.captions is not None:
            self.captions.table.ahead(spans)

    def finish(self, labels: Tensor, arrays: Mapping[str, Tensor], position: Tensor) -> Cond:
        """The conditions of samples at these positions [B], on the device."""
        return Cond(
            labels=labels,
            text=None if self.captions is None else self.captions.finish(arrays, position),
            controls=None if self.controls is None else self.controls.finish(arrays, position),
        )
