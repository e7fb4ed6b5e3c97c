"""The `init_from:` key of a run's config."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from fasttrain.registry import shown


class InitFrom(BaseModel):
    """What a new run's weights begin from, instead of random numbers. A text alone is the source.

    source: another run's folder, a safetensors file (`fasttrain export`, or with the names of DiT's or Min-SNR's public code), or a folder
    of diffusers' DiTTransformer2DModel or SD3Transformer2DModel.
    weights: which of a run's, `ema`, `ema_1` ... or `raw` (default: `ema`). A file or diffusers' folder holds one set.
    positions: learned positions of another grid are resampled bicubically, or made anew (`fresh`). Fixed ones are always made for the grid.
    patch: for another patch size, `resize` the patch embedding and the last layer, or make them anew (`fresh`); left out, it is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    source: str
    weights: str | None = None
    positions: Literal["resample", "fresh"] = "resample"
    patch: Literal["resize", "fresh"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_source_alone(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str) else given

    @field_validator("source")
    @classmethod
    def _is_a_place(cls, given: str) -> str:
        """Messages name it: a terminal must be able to show it."""
        if not (given.strip() and given.isprintable()):
            raise ValueError(f"give a folder or file in printable characters, not {shown(given)}")
        return given
