"""The parts of a run that its config alone decides: the network with its first weights, and the training objective."""

import torch

from fasttrain.cond import Nothing
from fasttrain.config import RunConfig
from fasttrain.diffusion.objective import Objective
from fasttrain.models.implementations import Implementations
from fasttrain.models.network import Network


def build_network(config: RunConfig, attention: str = "auto") -> Network:
    """The run's network with its initial weights, the same on every rank: a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return config.model.build(Implementations(config.kernels, attention, config.training.deterministic))


def nothing(config: RunConfig) -> Nothing:
    """What the run's model is told where conditions are left out."""
    return Nothing(label=config.model.null_label)


def build_objective(config: RunConfig, seed: torch.Tensor) -> Objective:
    """The training objective; label dropout is off for a model without classes."""
    d, without = config.diffusion, nothing(config)
    return Objective(
        d.schedule,
        d.prediction,
        d.weighting,
        d.timesteps,
        nothing=without,
        label_drop=d.label_drop if without.has_semantics else 0.0,
        seed=seed,
        ranges=config.log.timestep_ranges,
        kernels=config.kernels,
    )
