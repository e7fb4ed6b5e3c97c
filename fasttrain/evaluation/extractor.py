"""Features from a classifier of the set's own classes: one safetensors file holds its weights and what is known of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.evaluation.classifier import SMALLEST, Classifier, to_input
from fasttrain.evaluation.features import FEATURES, Features, Images
from fasttrain.files import digest
from fasttrain.registry import shown
from fasttrain.tensor_file import write_tensors

FORMAT = 1
VERSION = 1  # of what the network computes of its weights and images
BATCH = 256  # images at once: the features of one do not depend on the others
_METADATA = "fasttrain_extractor"


class Record(BaseModel):
    """What is known of an extractor.

    channels, size: of its images. classes: their names, in the order of the labels. accuracy: the share of the `held_out` images, which
    it never saw in training on the `trained` others, whose class it tells. steps, seed: of its training. set, set_xxh3: which images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = FORMAT
    channels: int = Field(ge=1, le=3)
    size: int = Field(ge=SMALLEST, le=1024)
    classes: tuple[str, ...] = Field(min_length=2, max_length=100_000, strict=False)
    accuracy: float = Field(ge=0, le=1)
    held_out: int = Field(ge=1)
    trained: int = Field(ge=1)
    steps: int = Field(ge=1)
    seed: int
    set: str
    set_xxh3: str
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Extractor:
    """A trained classifier in evaluation mode, with its record and the digest of its file (None before it is saved)."""

    network: Classifier
    record: Record
    xxh3: str | None = field(default=None)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Extractor":
        """The extractor that `save` wrote.

        Raises:
            UserError: no such file, or none of these.
        """
        try:
            with safe_open(path, framework="pt") as file:
                record = Record.model_validate_json((file.metadata() or {}).get(_METADATA, ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
            if record.format != FORMAT:
                raise ValueError(f"format {record.format}, this version reads {FORMAT}")
            network = _network(record, tensors)
        except (OSError, SafetensorError, ValidationError, ValueError, RuntimeError) as error:
            told = str(error).splitlines()[0]
            raise UserError(
                f"{path}: no extractor of `fasttrain evaluate train-extractor` ({shown(told)}); train one, or name its file"
            ) from None
        return cls(network.to(device).eval(), record, digest(path))

    def save(self, path: Path) -> None:
        """Writes one file, which appears whole or not at all. Raises OSError where it cannot be written."""
        write_tensors(path, self.network.state_dict(), {_METADATA: self.record.model_dump_json()})

    @property
    def told(self) -> Mapping[str, Any]:
        """Its record and its file's digest."""
        return {"name": "extractor", "version": VERSION, "xxh3": self.xxh3, **self.record.model_dump(mode="json")}

    def __call__(self, images: Images) -> NDArray[np.float64]:
        """[n, D] float64, what the classifier sees of images [n, size, size, channels] before it decides."""
        return self._each(images, self.network.features).double().numpy()

    def classify(self, images: Images) -> NDArray[np.int64]:
        """The label [n] of each of these images."""
        return self._each(images, lambda x: self.network(x).argmax(dim=1)).numpy()

    @torch.no_grad()
    def _each(self, images: Images, function: Any) -> Tensor:
        return torch.cat([function(batch).cpu() for batch in self._inputs(images)])

    def _inputs(self, images: Images) -> Iterator[Tensor]:
        wanted = (self.record.size, self.record.size, self.record.channels)
        if images.shape[1:] != wanted:
            raise UserError(
                f"the extractor was trained on images of {wanted}, these are {images.shape[1:]} (H, W, C): train one on a set of those"
            )
        device = self.network.decide.weight.device
        # TF32 would make features of a GPU differ from a CPU's in the third digit.
        with torch.backends.cudnn.flags(allow_tf32=False):
            for start in range(0, len(images), BATCH):
                yield to_input(torch.from_numpy(images[start : start + BATCH]).to(device).permute(0, 3, 1, 2))


@FEATURES.register("extractor")
@dataclass(frozen=True)
class ExtractorFile:
    """The features of a classifier that `fasttrain evaluate train-extractor` trained."""

    file: str

    def open(self, device: torch.device) -> Features:
        """The extractor in the file."""
        return Extractor.load(Path(self.file), device)


def _network(record: Record, tensors: dict[str, Tensor]) -> Classifier:
    network = Classifier(record.channels, record.size, len(record.classes))
    network.load_state_dict(tensors)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError("its weights are not finite")
    return network
