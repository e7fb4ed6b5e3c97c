"""Small sets of shards of any kind and shape, for tests that need no pictures in them."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from fasttrain.data.facts import RECORDED
from fasttrain.data.index import Source, VaeRecord
from fasttrain.data.prepare.assembly import prepare_set
from fasttrain.data.prepare.latents import shift_and_scale
from fasttrain.data.prepare.plan import Plan
from fasttrain.data.prepare.writer import Made

SAMPLES = 6


def _random_samples(shape: tuple[int, ...], dtype: str, classes: int, entries: Sequence[int]) -> Iterator[Made]:
    for entry in entries:
        values = np.random.default_rng(entry).random(shape)
        array = (values * 255).astype(dtype) if dtype == "uint8" else values.astype(dtype)
        side = float(shape[-1])
        yield Made(str(entry), (array, entry % classes), facts=(side, side, 0.0, 0.0, 1.0))


def write_random(out: Path, kind: str, shape: tuple[int, ...], classes: int, vae: str = "stabilityai/sd-vae-ft-mse") -> Path:
    """A few random samples of a kind ("image" or "latent") and stored shape, by the real writer; latents say that `vae` made them."""
    dtype = "uint8" if kind == "image" else "float16"
    record = VaeRecord(id=vae, revision="0" * 40, scaling_factor=0.18215) if kind == "latent" else None
    plan = Plan(
        kind=kind,  # type: ignore[arg-type]
        shape=shape,
        dtype=dtype,
        classes=tuple(map(str, range(classes))),
        source=Source(name="random", xxh3=xxhash.xxh3_128_hexdigest(b"random")),
        entries=range(SAMPLES),
        shard_size=4,
        vae=record,
        facts=RECORDED,
    )
    measure = (lambda folder, receipts: shift_and_scale(folder, receipts, shape, dtype)) if record else None
    prepare_set(out, plan, partial(_random_samples, shape, dtype, classes), measure)
    return out
