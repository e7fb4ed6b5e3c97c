"""A reference's statistics, computed once: a file for each reference and features, known by the digests of both.

    REFERENCE-FEATURES.safetensors      mean, cov, rows, radii; metadata: what they are, and the digest of their bytes

Kept by another version of Python, fasttrain, torch, numpy or Pillow they are not found; the features' own `version` tells of their formula,
which a source tree's version does not. Whoever writes it renames a draft, so a file is whole; one whose digest is wrong is computed again.
The 16 files that were used last stay (of 50,000 vectors of 2048 numbers each 0.4 GB): whoever keeps another removes those before them.
That order is of file times, so a clock that jumps makes the wrong one go, which is then computed again.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fasttrain.evaluation.collected import MOST_ROWS, Statistics
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.frechet import Gaussian
from fasttrain.evaluation.precision_recall import K
from fasttrain.evaluation.protocol import versions
from fasttrain.evaluation.reference import Reference
from fasttrain.tensor_file import write_tensors

FORMAT = 2
MOST_FILES = 16
_METADATA = "fasttrain_statistics"


class KeptStatistics:
    """The statistics of references in a folder, which is made where it is missing."""

    def __init__(self, folder: Path):
        self._folder = folder

    def find(self, reference: Reference, features: Features, device: torch.device) -> Statistics | None:
        """What was kept of a reference's images, if it is sound."""
        wanted = _identity(reference, features, device)
        try:
            place = self._place(wanted)
            with safe_open(place, framework="pt") as file:
                known = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
            if known["of"] != wanted or known["xxh3"] != _digest(tensors):
                return None
            with suppress(OSError):  # another user's file keeps the time of its making
                os.utime(place)
            gaussian = Gaussian(tensors["mean"], tensors["cov"], int(known["vectors"]))
            return Statistics(gaussian, tensors["rows"], radii=tensors.get("radii"))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def keep(self, reference: Reference, features: Features, device: torch.device, found: Statistics) -> None:
        """Keeps them for the next time. Raises OSError where they cannot be written."""
        assert found.rows is not None and found.gaussian.vectors is not None
        of = _identity(reference, features, device)
        parts = {"mean": found.gaussian.mean, "cov": found.gaussian.cov, "rows": found.rows, "radii": found.radii}
        tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
        told = {"of": of, "vectors": found.gaussian.vectors, "xxh3": _digest(tensors)}
        write_tensors(self._place(of), tensors, {_METADATA: json.dumps(told)})

        self._forget_but(self._place(of))

    def _forget_but(self, newest: Path) -> None:
        """Removes what was not used for longest: of the others, all but MOST_FILES - 1."""
        with suppress(OSError):  # somebody else removes them too, or they are another user's: the next one who keeps some tries again
            others = [path for path in self._folder.glob("*.safetensors") if path != newest]
            for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True)[MOST_FILES - 1 :]:
                path.unlink(missing_ok=True)

    def _place(self, identity: dict[str, Any]) -> Path:
        features = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
        return self._folder / f"{identity['reference']}-{features}.safetensors"


def _identity(reference: Reference, features: Features, device: torch.device) -> dict[str, Any]:
    """All that decides the statistics; a GPU rounds a network's features differently."""
    return {
        "format": FORMAT,
        "reference": reference.xxh3,
        "features": json.loads(json.dumps(features.told)),
        "device": device.type,
        "most_rows": MOST_ROWS,
        "k": K,
        "versions": versions(),
    }


def _digest(tensors: dict[str, Tensor]) -> str:
    hasher = xxhash.xxh3_128()
    for name in sorted(tensors):
        hasher.update(tensors[name].contiguous().numpy().data)
    return hasher.hexdigest()
