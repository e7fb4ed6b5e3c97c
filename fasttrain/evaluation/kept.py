"""A reference's statistics, computed once: a file for each reference and features, known by the digests of both.

    REFERENCE-FEATURES.safetensors      mean, cov, rows, radii; metadata: what they are, and the digest of their bytes

Kept by another version of Python, fasttrain, torch, numpy or Pillow they are not found; the features' own `version` tells of their formula,
which a source tree's version does not. Whoever writes it renames a draft, so a file is whole; one whose digest is wrong is computed again.
"""

import json
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
from fasttrain.evaluation.tensor_file import write_tensors

FORMAT = 2
_METADATA = "fasttrain_statistics"


class KeptStatistics:
    """The statistics of references in a folder, which is made where it is missing."""

    def __init__(self, folder: Path):
        self._folder = folder

    def find(self, reference: Reference, features: Features, device: torch.device) -> Statistics | None:
        """What was kept of a reference's images, if it is sound."""
        wanted = _identity(reference, features, device)
        try:
            with safe_open(self._place(wanted), framework="pt") as file:
                known = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
            if known["of"] != wanted or known["xxh3"] != _digest(tensors):
                return None
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
        write_tensors(self._place(of), tensors, _METADATA, told)

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
