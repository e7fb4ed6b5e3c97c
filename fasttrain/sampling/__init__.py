"""From noise to images. `SAMPLERS.build("heun")` gives a sampler."""

from fasttrain.sampling import diffusers, euler, heun  # noqa: F401  (their registrations)
from fasttrain.sampling.sampler import SAMPLERS, Sampler

__all__ = ["SAMPLERS", "Sampler"]
