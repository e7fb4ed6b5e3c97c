"""The data that a run's config names: its shards and, for a model of text, the text that belongs to them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fasttrain.cond import Text
from fasttrain.config import RunConfig
from fasttrain.data.foreign.pattern import pattern_of
from fasttrain.data.index import Index
from fasttrain.data.loader import Loader, held_out_loader, training_loader
from fasttrain.data.remote.addresses import join, scheme_of, shown
from fasttrain.data.remote.store import open_files
from fasttrain.data.shards import ShardSet
from fasttrain.data.text.table import OWN_FOLDER, TEXT_FILE, TextTable
from fasttrain.errors import UserError
from fasttrain.models import MODELS
from fasttrain.models.mmdit import MmDiT


@dataclass(frozen=True)
class RunData:
    """Opened data.

    Attributes:
        shards: the set.
        text: its captions, where the model takes them.
    """

    shards: ShardSet
    text: TextTable | None = None

    @property
    def index(self) -> Index:
        """The set's index, with which text the run reads."""
        return self.shards.index.model_copy(update={"text": self.text.record if self.text else None})

    @property
    def empty(self) -> Text | None:
        """The empty caption as its encoder gave it, on the host."""
        return None if self.text is None else self.text.empty

    def training_loader(self, config: RunConfig, seed: Tensor) -> Loader:
        """The samples that a resolved config trains on, with what its model is told of them; see `loader.training_loader`."""
        return training_loader(config.data, self.shards, seed, config.kernels, config.controls, self.text)

    def held_out_loader(self, config: RunConfig, seed: Tensor) -> Loader:
        """The held-out ones; see `loader.held_out_loader`."""
        return held_out_loader(config.data, self.shards, seed, config.kernels, config.controls, self.text)

    def describe_text(self) -> str | None:
        """A line for people on the text that is read."""
        if self.text is None:
            return None
        record = self.text.record
        return (
            f"{self.text.captions:,} captions by {record.id}, {record.tokens} x {record.width} and {record.pooled} pooled: "
            f"{self.text.files.place}"
        )

    def close(self) -> None:
        """Ends what fetches ahead."""
        self.shards.close()
        if self.text is not None:
            self.text.close()


def open_data(config: RunConfig, alive: Callable[[], None] = lambda: None) -> RunData:
    """Opens a run's shards and text.

    Args:
        alive: called now and then while shards are indexed, which may take long the first time.

    Raises:
        UserError: as ShardSet.open and TextTable.open; or text that the model does not take, or that is missing.
    """
    shards = ShardSet.open(config.data.train, config.data, alive)
    place = _text_place(config, shards.index)
    return RunData(shards, None if place is None else TextTable.open(place, shards.index, config.data))


def _text_place(config: RunConfig, index: Index) -> str | None:
    """Where the text lies that the run reads; None where it reads none.

    An mmDiT takes the text that `data.text` names or that lies inside the set, unless its config counts classes.
    """
    model, data = config.model, config.data
    if not isinstance(model, MmDiT):
        if data.text is not None:
            raise UserError(f"data.text is given, but model {MODELS.spec(model)['name']!r} takes none: choose mmdit, or remove it")
        return None
    if data.text is not None:
        if model.num_classes:
            raise UserError(f"model.num_classes {model.num_classes} and data.text: an mmdit is told classes or text; remove one of them")
        return data.text
    if model.num_classes:
        return None
    own = _own_text(config)
    if own is None and (model.takes_text or model.num_classes == 0 or not index.num_classes):
        raise UserError(
            f"the model takes text, and there is none with {shown(data.train)}: make it with `fasttrain prepare text`, "
            "set data.text to where it is, or give model.num_classes"
        )
    return own


def _own_text(config: RunConfig) -> str | None:
    """The text inside the set, if there is some. Raises UserError where its preparation was not finished."""
    train = config.data.train
    if pattern_of(train) is not None:
        return None
    place = join(train, OWN_FOLDER) if scheme_of(train) else f"{train.rstrip('/')}/{OWN_FOLDER}"
    files = open_files(place, config.data, (TEXT_FILE,))
    try:
        files.path(TEXT_FILE)
    except FileNotFoundError:
        if scheme_of(train) is None and Path(place).is_dir():
            raise UserError(
                f"{place}: unfinished text, without {TEXT_FILE}; run its `fasttrain prepare text` again, or remove it"
            ) from None
        return None
    finally:
        files.close()
    return place
