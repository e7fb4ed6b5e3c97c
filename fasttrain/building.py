"""The parts of a run that its config alone decides: the network with its first weights, and the training objective."""

import torch

from fasttrain.cond import Nothing, Text
from fasttrain.config import RunConfig
from fasttrain.data.text.padding import padded
from fasttrain.diffusion.objective import Objective
from fasttrain.diffusion.uncertainty import add_uncertainty
from fasttrain.models.implementations import Implementations
from fasttrain.models.network import Network


def build_network(config: RunConfig, attention: str = "auto") -> Network:
    """The run's network with its initial weights, the same on every rank: a function of the seed. With an uncertainty, if asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = config.model.build(Implementations(config.kernels, attention, config.training.deterministic))
    if config.diffusion.uncertainty:
        add_uncertainty(network, config.diffusion.schedule)
    return network


def nothing(config: RunConfig, empty: Text | None = None) -> Nothing:
    """What the run's model is told where conditions are left out: the same in training and sampling.

    Args:
        empty: the empty caption as its encoder gave it, B = 1, where the network is; None for a model without text.
    """
    text = None
    if empty is not None:
        # Its noise is drawn once, under the run's own seed: "no caption" is one embedding, not many.
        at = torch.zeros_like(empty.length)
        text = padded(empty, config.seed, at, config.data.text_padding, config.kernels.of("text_padding"))
    return Nothing(label=config.model.null_label, text=text, controls=bool(config.controls))


def build_objective(config: RunConfig, seed: torch.Tensor, empty: Text | None = None) -> Objective:
    """The training objective; what a model is not told is not dropped. `empty`: as for `nothing`, on the host."""
    d = config.diffusion
    without = nothing(config, None if empty is None else empty.map(lambda part: part.to(seed.device)))
    return Objective(
        d.schedule,
        d.prediction,
        d.weighting,
        d.timesteps,
        nothing=without,
        label_drop=d.label_drop if without.has_semantics else 0.0,
        control_drop=d.control_drop if without.controls else 0.0,
        seed=seed,
        ranges=config.log.timestep_ranges,
        kernels=config.kernels,
    )
