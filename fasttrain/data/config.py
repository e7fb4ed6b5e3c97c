"""The `data:` section of a run's config."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """Where the training samples come from and how they are read.

    train: folder of shards. held_out: the last samples of the set, kept out of training. flip: mirror half of the visits.
    vae: the autoencoder (hub id or folder) that must have made the latents, and that decodes samples during training.
    normalise: latents to zero mean and unit variance by `channel`, or by the VAE's own factor as the papers did (`vae`).
    streams, window_shards: the order's locality. threads: gathering batches; 0 gathers in the caller. ahead: batches kept ready.
    verify: compare each shard's digest once, when it is first touched.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str
    vae: str | None = None
    held_out: int = Field(default=0, ge=0)
    flip: bool = False
    normalise: Literal["channel", "vae"] = "channel"
    streams: int = Field(default=64, ge=1)
    window_shards: int = Field(default=4, ge=1)
    threads: int = Field(default=1, ge=0)
    ahead: int = Field(default=4, ge=1)
    verify: bool = True
