"""The schedules that are tables of integer timesteps, and every sampler of timesteps with the parameters that a run fills in."""

from typing import Any

from fasttrain.diffusion.schedule import SCHEDULES, DiscreteSchedule
from fasttrain.diffusion.timesteps import TIMESTEPS

TABLES = [name for name in SCHEDULES.names() if isinstance(SCHEDULES.build(name), DiscreteSchedule)]
FILLED_IN: dict[str, dict[str, Any]] = {"curriculum": {"images": 2000}}
DRAWS = {name: {"name": name, **FILLED_IN.get(name, {})} for name in TIMESTEPS.names()}
