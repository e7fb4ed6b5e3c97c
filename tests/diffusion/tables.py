"""The schedules that are tables of integer timesteps, those that are not, and every sampler of timesteps, filled in as by a run."""

from typing import Any

from fasttrain.diffusion.schedule import SCHEDULES, DiscreteSchedule
from fasttrain.diffusion.timesteps import TIMESTEPS

TABLES = [name for name in SCHEDULES.names() if isinstance(SCHEDULES.build(name), DiscreteSchedule)]
REAL: list[dict[str, Any]] = [{"name": name} for name in SCHEDULES.names() if name not in TABLES] + [
    {"name": "flow", "shift": 3},
    {"name": "flow", "shift": 0.4},
    {"name": "edm", "mean": -0.4, "std": 1.0},
]  # continuous paths
FILLED_IN: dict[str, dict[str, Any]] = {"curriculum": {"images": 2000}}
DRAWS = {name: {"name": name, **FILLED_IN.get(name, {})} for name in TIMESTEPS.names()}
