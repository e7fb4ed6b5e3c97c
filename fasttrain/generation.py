"""What makes samples from a network of this config."""

import torch
from torch import Tensor, nn

from fasttrain.building import nothing
from fasttrain.config import RunConfig
from fasttrain.sampling.generate import Generator
from fasttrain.sampling.heun import Heun


def build_generator(
    config: RunConfig, network: nn.Module, steps: int, guidance: float, seed: Tensor, dtype: torch.dtype = torch.float32
) -> Generator:
    """A generator with the run's schedule and target; `seed` [] int64 lies where the network does, whose input is of `dtype`."""
    channels, size, num_classes = config.model.geometry()
    return Generator(
        model=network,
        schedule=config.diffusion.schedule,
        prediction=config.diffusion.prediction,
        sampler=Heun(steps=steps),
        shape=(channels, size, size),
        num_classes=num_classes,
        nothing=nothing(config),
        guidance=guidance,
        seed=seed,
        dtype=dtype,
    )
