"""The schedules that are tables of integer timesteps."""

from fasttrain.diffusion.schedule import SCHEDULES, DiscreteSchedule

TABLES = [name for name in SCHEDULES.names() if isinstance(SCHEDULES.build(name), DiscreteSchedule)]
