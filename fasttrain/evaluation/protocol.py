"""How a score was made, kept beside the number: without it nobody can reproduce or compare one."""

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.files import write_whole
from fasttrain.versions import installed

NOT_INSTALLED = "not installed (run from a source tree)"


def versions() -> dict[str, str]:
    """Versions of what decides the last digits of a score."""
    packages = ("fasttrain", "torch", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: installed(name) or NOT_INSTALLED for name in packages}}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Where the samples and the reference of a score came from.

    Args:
        reference, reference_digest: the reference's name and the digest of its index, or of its file.
        reference_kind: "images", or "statistics" that others computed, of features that their file does not name.
        checkpoint_step: optimizer steps behind the weights; weights: which ones, e.g. "raw" or "ema 500000 images".
        sampler: spec of the sampler with its steps; guidance: its scale, or all of its numbers where there is more; seed: of the samples.
        conditions: what the samples were asked to show by turns: classes, or captions and their digest; controls.
        vae: which autoencoder decoded the samples: id, with its revision or the digest of its folder (xxh3); None for pixels.
        device: where samples and features were computed; versions: of what computed them.
    """

    reference: str
    reference_digest: str
    reference_kind: str
    checkpoint_step: int
    weights: str
    sampler: Mapping[str, Any]
    guidance: float | Mapping[str, Any]
    seed: int
    device: str
    conditions: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, str] | None = None
    versions: Mapping[str, str] = field(default_factory=versions)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How near samples are to a reference, what it was measured on, and its protocol.

    Attributes:
        precision, recall, neighbours: see precision_recall.py, with its k and how many vectors of each; None where there are too few.
        features: which, with the digest of their file, and the accuracy of an extractor.
        reference_samples: None where the reference does not say.
        agreement: per class, see agreement.py; None without an extractor of the run's classes.
    """

    frechet_distance: float
    precision: float | None
    recall: float | None
    neighbours: Mapping[str, int] | None
    features: Mapping[str, Any]
    samples: int
    reference_samples: int | None
    protocol: Protocol
    agreement: Mapping[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Writes all of it as JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")
