"""What the configs of DiT and mmDiT have in common: transformers whose norms time and controls scale, shift and gate."""

from abc import ABC
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fasttrain.cond import CONTROLS, control_columns
from fasttrain.models import flops
from fasttrain.models.architecture import LARGEST, MOST_ROWS, Transformer
from fasttrain.models.embeddings import TimestepEmbedder, grid_coordinates
from fasttrain.registry import nearest, shown

Level = Literal["high", "low"]
"""What a control is about: the image's composition (from the first denoising step on), or its details (by gamma_c)."""


@dataclass(frozen=True, kw_only=True)
class Modulated(Transformer, ABC):
    """The fields of a transformer whose norms are modulated.

    Args:
        norm: "layer" as published, or "rms" (no mean subtracted). Neither has parameters.
        controls: what the model is told of how an image was made, names of `cond.CONTROLS`, each as "high" or "low" level. Kept in the
            order of CONTROLS, which is that of the columns of `Cond.controls`.
        control_power: a of gamma_c(t) = (1 - cos(pi (1 - t/T)^a)) / 2, the weight of the low-level controls; None: always 1.
        num_timesteps: T of gamma_c; None: as the run's schedule says.
        position_base: grid whose coordinates the positions keep, linspace(0, position_base, grid); None: the model's own grid.

    Raises:
        ValueError: as Transformer; a width not divisible by 4, which the sin-cos positions need; an unknown control; or a number that
            is not positive.
    """

    norm: Literal["layer", "rms"] = "layer"
    controls: dict[str, Level] = field(default_factory=dict)
    control_power: float | None = 8.0
    num_timesteps: int | None = None
    position_base: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 4:
            raise ValueError(f"model.width {self.width} is not divisible by 4, which the sin-cos positions need")
        if self.control_power is not None and not self.control_power > 0:
            raise ValueError(f"model.control_power must be above 0, or null for a constant weight, not {shown(self.control_power)}")
        for key, most in (("num_timesteps", MOST_ROWS), ("position_base", LARGEST)):
            value = getattr(self, key)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"model.{key} must be at least 1 and at most {most}, not {shown(value)}")
        for control in self.controls:
            if control not in CONTROLS:
                raise ValueError(f"model.controls: unknown control {shown(control)}; {nearest(control, CONTROLS)}")
        object.__setattr__(self, "controls", {control: self.controls[control] for control in CONTROLS if control in self.controls})

    @property
    def control_columns(self) -> tuple[str, ...]:
        """The columns of `Cond.controls`, in order."""
        return control_columns(self.controls)

    def coordinates(self) -> Tensor:
        """[grid] float64: where the patches along one side are, for the positions."""
        return grid_coordinates(self.grid, self.position_base)

    def ends_flops(self, tokens: int, outputs: int) -> int:
        """Of what is not in the blocks: patches in; the last layer on `tokens` tokens to `outputs` values each; the timestep's MLP."""
        first = flops.patches(self.width, self.patch, self.geometry()[0], self.grid**2)
        last = tokens * flops.linear(self.width, outputs) + flops.linear(self.width, 2 * self.width)
        return first + last + flops.linear(TimestepEmbedder.frequencies, self.width) + flops.linear(self.width, self.width)
