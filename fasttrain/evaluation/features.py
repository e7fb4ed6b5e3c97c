"""What a score compares: feature vectors of images. Another extractor is one more registered class."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fasttrain.registry import Registry

FEATURES = Registry("features")

Images = NDArray[np.uint8]  # [n, H, W, C]


class Features(Protocol):
    """An extractor: images in, one vector an image out."""

    def __call__(self, images: Images) -> NDArray[np.float64]:
        """[n, D] float64 of images [n, H, W, C] uint8."""


@FEATURES.register("pixels")
@dataclass(frozen=True)
class Pixels:
    """The raw pixels, byte / 255, flattened. Compares mean and covariance of images; blind to what they show: no substitute for FID."""

    def __call__(self, images: Images) -> NDArray[np.float64]:
        """[n, H W C] float64 in [0, 1]."""
        return images.reshape(len(images), -1) / 255.0
