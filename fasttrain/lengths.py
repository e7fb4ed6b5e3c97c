"""Lengths that a config leaves open: planned from the run's own when it begins, and kept where the run is made longer later on.

A checkpoint holds those in effect. What a run goes on with is, key by key: what the config gives; else what its newest checkpoint holds;
else what the run's length plans. So a schedule that was planned at the start goes on as planned.
"""

from collections.abc import Mapping
from dataclasses import replace

from fasttrain.config import RunConfig
from fasttrain.diffusion.curriculum import SHARE_OF_RUN, Curriculum
from fasttrain.engine.momentum import Demon

CURRICULUM, MOMENTUM, RATE = "diffusion.timesteps.images", "optimizer.momentum_decay.steps", "optimizer.decay.steps"


def lengths(config: RunConfig) -> dict[str, int | None]:
    """By key, each length that this config has; None: left open."""
    timesteps, optimizer = config.diffusion.timesteps, config.optimizer
    found: dict[str, int | None] = {}
    if isinstance(timesteps, Curriculum):
        found[CURRICULUM] = timesteps.images
    if optimizer.momentum_decay is not None:
        found[MOMENTUM] = optimizer.momentum_decay.steps
    if isinstance(optimizer.decay, Demon):
        found[RATE] = optimizer.decay.steps
    return found


def planned(config: RunConfig) -> dict[str, int]:
    """What each length is where nobody gives it, of a run as long as this one."""
    steps, batch = config.training.steps, config.training.global_batch
    return {CURRICULUM: max(1, round(SHARE_OF_RUN * steps * batch)), MOMENTUM: steps, RATE: steps}


def filled(config: RunConfig, begun: Mapping[str, int]) -> RunConfig:
    """The config with no length open. `begun`: those that the run has gone by so far."""
    plan = {**planned(config), **begun}
    found = {key: plan[key] if given is None else given for key, given in lengths(config).items()}
    diffusion, optimizer = config.diffusion, config.optimizer
    if CURRICULUM in found:
        assert isinstance(diffusion.timesteps, Curriculum)
        diffusion = diffusion.model_copy(update={"timesteps": replace(diffusion.timesteps, images=found[CURRICULUM])})
    demons = {key.split(".")[1]: found[key] for key in (MOMENTUM, RATE) if key in found}
    optimizer = optimizer.model_copy(
        update={key: getattr(optimizer, key).model_copy(update={"steps": steps}) for key, steps in demons.items()}
    )
    return config.model_copy(update={"diffusion": diffusion, "optimizer": optimizer})


def told_of_kept(asked: RunConfig, config: RunConfig) -> list[str]:
    """What to say of each length that goes on as planned at the start though the run's own has changed since.

    Args:
        asked: the config as it was given.
        config: the same, filled.
    """
    plan, given = planned(config), lengths(asked)
    return [
        f"{key} stays {length}, as planned when the run began; for {plan[key]}, which this run's length would plan, give that"
        for key, length in lengths(config).items()
        if given[key] is None and length != plan[key]
    ]
