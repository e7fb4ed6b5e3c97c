"""The `data:` section of a run's config."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fasttrain.data.remote.addresses import refuse_secrets
from fasttrain.data.text.padding import TextPadding
from fasttrain.registry import shown


class DataConfig(BaseModel):
    """Where the training samples come from and how they are read.

    train: folder of shards, or a URL of one (http, https, or what fsspec opens: s3, gs, hf ...), or a pattern of WebDataset shards made
    elsewhere (`FOLDER/train-{000000..001281}.tar`, also as URLs, and `pipe:COMMAND` where `allow_pipe` says so).
    held_out: the last samples of the set, kept out of training. flip: mirror half of the visits.
    vae: the autoencoder (hub id or folder) that must have made the latents, and that decodes samples during training.
    normalise: latents to zero mean and unit variance by `channel`, or by the VAE's own factor as the papers did (`vae`).
    streams, window_shards: the order's locality. threads: gathering batches; 0 gathers in the caller. ahead: batches kept ready.
    verify: compare each shard's digest once, when it is first touched. max_damaged: the share of samples that may be unreadable, and be
    replaced by others, before the run stops.
    size: pixels a side that the model sees. Images of shards made elsewhere are cropped and resized to it; prepared ones that are stored
    larger are averaged down to it, whole or, with crop_scale, in crops of [least, most] of their area, anew at each visit.
    text: folder or URL that `fasttrain prepare text` wrote, for a model of text (null: `text` inside the set). text_padding: what stands
    behind a caption.
    cache, cache_gib: folder and bound of what is kept of remote shards and of indexes (default: $FASTTRAIN_CACHE or ~/.cache/fasttrain).
    retry_seconds: how long a passing failure of a remote store is tried again before the run stops.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    train: str
    vae: str | None = None
    held_out: int = Field(default=0, ge=0, lt=2**32)
    flip: bool = False
    normalise: Literal["channel", "vae"] = "channel"
    streams: int = Field(default=64, ge=1, le=2**20)
    window_shards: int = Field(default=4, ge=1, le=2**20)
    threads: int = Field(default=1, ge=0, le=256)
    ahead: int = Field(default=4, ge=1, le=1024)
    verify: bool = True
    max_damaged: float = Field(default=0.01, ge=0, le=1)
    size: int | None = Field(default=None, gt=0, le=2**14)
    crop_scale: tuple[float, float] | None = None
    text: str | None = None
    text_padding: TextPadding = TextPadding()
    cache: str | None = None
    cache_gib: float = Field(default=64, gt=0, le=2**30)
    retry_seconds: float = Field(default=300, ge=0, le=1e7)
    allow_pipe: bool = False

    @field_validator("train", "vae", "cache", "text")
    @classmethod
    def _is_a_place(cls, given: str | None) -> str | None:
        """Messages name it: a terminal must be able to show it."""
        if given is not None and not (given.strip() and given.isprintable()):
            raise ValueError(f"give a place in printable characters, not {shown(given)}")
        return given

    @field_validator("train", "text")
    @classmethod
    def _carries_no_secret(cls, place: str | None) -> str | None:
        if place is not None:
            refuse_secrets(place)
        return place

    @field_validator("crop_scale")
    @classmethod
    def _is_a_scale(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"give two shares of the area, [least, most], with 0 < least <= most <= 1, not {list(scale)}")
        return scale
