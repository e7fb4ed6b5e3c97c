"""What a score compares: feature vectors of images. Another extractor is one more registered class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fasttrain.registry import Registry

FEATURES = Registry("features")

Images = NDArray[np.uint8]  # [n, H, W, C]


class Features(Protocol):
    """An extractor: images in, one vector an image out."""

    @property
    def told(self) -> Mapping[str, Any]:
        """What decides its numbers: its name, the `version` of its formula here, raised with every change of it, the digest of its file.

        A score keeps it, and statistics that were kept are found by it.
        """

    def __call__(self, images: Images) -> NDArray[np.float64]:
        """[n, D] float64 of images [n, H, W, C] uint8. Raises UserError for images that it cannot take."""


class Choice(Protocol):
    """Features as a command line names them."""

    def open(self, device: torch.device) -> Features:
        """The extractor, on the device. Raises UserError where its file is none."""


@FEATURES.register("pixels")
@dataclass(frozen=True)
class Pixels:
    """The raw pixels, byte / 255, flattened. Compares mean and covariance of images; blind to what they show: no substitute for FID."""

    @property
    def told(self) -> Mapping[str, Any]:
        return {"name": "pixels", "version": 1}

    def open(self, device: torch.device) -> Features:
        """These need no file and no device."""
        return self

    def __call__(self, images: Images) -> NDArray[np.float64]:
        """[n, H W C] float64 in [0, 1]."""
        return images.reshape(len(images), -1) / 255.0
