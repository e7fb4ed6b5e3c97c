"""Controls: how an image was made (its original size, crop, flip ...), told to a network without disturbing what it shows.

    c(phi_h, phi_l, t) = E_h(phi_h) + gamma_c(t) E_l(phi_l)                    [Berrada et al. 2024, Eq. 1]
    gamma_c(t) = (1 - cos(pi (1 - t/T)^a)) / 2                                 [their table A4; a = 8]

High-level controls (flip, crop, aspect) count at every timestep, low-level ones (size) once the semantics are settled. The sum is a part
of the vector that modulates the norms; class and text enter through attention, so neither overpowers the other.
"""

import math

import torch
from torch import Tensor, nn

from fasttrain.cond import CONTROLS, Cond
from fasttrain.errors import UserError
from fasttrain.models import flops
from fasttrain.models.embeddings import sinusoid
from fasttrain.models.modulated import Level, Modulated

FREQUENCIES = 256
"""Values of each number's sinusoid."""


def power_cosine(t: Tensor, num_timesteps: int, power: float) -> Tensor:
    """gamma_c(t) = (1 - cos(pi (1 - t/T)^a)) / 2 = sin^2(pi/2 (1 - t/T)^a): 1 at t = 0, exactly 0 at t = T.

    Args:
        t: [B] timesteps, integer or real.

    Returns:
        [B] fp32, computed in float64: the square of the sine keeps its digits where 1 - cos cancels.
    """
    left = (1 - t.double() / num_timesteps).clamp(min=0)  # [B]
    return (left**power * (math.pi / 2)).sin().square().float()


def levels(config: Modulated) -> dict[Level, tuple[int, ...]]:
    """The columns of `Cond.controls`, by number, of each level that the config has controls of."""
    found: dict[Level, tuple[int, ...]] = {}
    for level in ("high", "low"):
        wanted = {column for control, where in config.controls.items() if where == level for column in CONTROLS[control]}
        if wanted:
            found[level] = tuple(number for number, column in enumerate(config.control_columns) if column in wanted)
    return found


def control_flops(config: Modulated) -> int:
    """Of one image: two linear layers a level."""
    wide = (FREQUENCIES * len(columns) for columns in levels(config).values())
    return sum(flops.linear(inputs, config.width) + flops.linear(config.width, config.width) for inputs in wide)


class ControlEmbedder(nn.ModuleDict):
    """E_h and E_l, each a sinusoid of every number and then Linear, SiLU, Linear; the last layers start at zero.

    Raises:
        UserError: low-level controls are scheduled, and the number of timesteps is not known.
    """

    def __init__(self, config: Modulated):
        super().__init__()
        self.levels, self.columns = levels(config), config.control_columns
        for level, columns in self.levels.items():
            first, last = nn.Linear(FREQUENCIES * len(columns), config.width), nn.Linear(config.width, config.width)
            self[level] = nn.Sequential(first, nn.SiLU(), last)
        self.power, self.num_timesteps = config.control_power, config.num_timesteps
        if "low" in self.levels and self.power is not None and self.num_timesteps is None:
            raise UserError("model.num_timesteps: not set and not yet taken from diffusion.schedule, and low-level controls need it")

    @property
    def last_layers(self) -> list[nn.Module]:
        """The layers that start at zero."""
        return [mlp[2] for mlp in self.values()]  # type: ignore[index]

    def forward(self, cond: Cond, t: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The controls' part of the vector, [B, D]; None where the batch has none, and exactly 0 where `cond.controlled` says so.

        Raises:
            ValueError: another number of columns than the config's.
        """
        if cond.controls is None:
            return None
        if cond.controls.shape[1:] != (len(self.columns),):
            told = ", ".join(self.columns)
            raise ValueError(f"the model takes controls [B, {len(self.columns)}] ({told}), got {list(cond.controls.shape)}")
        parts = [self._part(level, cond.controls, t, dtype) for level in self.levels]
        total = sum(parts[1:], parts[0])  # [B, D]
        return total if cond.controlled is None else total.masked_fill(~cond.controlled[:, None], 0)

    def _part(self, level: Level, controls: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = torch.stack([controls[:, column] for column in self.levels[level]], dim=1)  # [B, k]
        waves = sinusoid(numbers.flatten(), FREQUENCIES).unflatten(0, numbers.shape).flatten(1)  # [B, 256 k]
        part = self[level](waves.to(dtype))  # [B, D]
        if level == "high" or self.power is None or self.num_timesteps is None:
            return part
        return part * power_cosine(t, self.num_timesteps, self.power).to(part.dtype)[:, None]
