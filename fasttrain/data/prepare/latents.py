"""A tree of class folders, or a tar of one, becomes shards of an autoencoder's posteriors.

Stored for each image: the plain and the flipped view, and of each the mean and log-variance, so that training can draw the posterior
anew at every visit. Encoded in fp32: latents depend on their batch's size (1e-6 in fp32, 8e-3 in bf16), so batches are fixed by index and
their size is part of the plan.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fasttrain.data.arrays import array_view
from fasttrain.data.crops import Scale
from fasttrain.data.facts import RECORDED
from fasttrain.data.index import Source
from fasttrain.data.prepare.assembly import Prepared, prepare_set
from fasttrain.data.prepare.captions import Captions, Wanted, add_caption_arguments, captions_wanted, list_uncaptioned
from fasttrain.data.prepare.images import ImageMaker, Read, add_crop_arguments, available_cores, crop_scale_of, crop_settings
from fasttrain.data.prepare.pixels import Unreadable
from fasttrain.data.prepare.plan import Plan
from fasttrain.data.prepare.source import Entry, Listing, open_source
from fasttrain.data.prepare.writer import Made, Receipt
from fasttrain.data.vae import Vae
from fasttrain.errors import UserError


class LatentMaker:
    """Files of a source to posteriors [2 views, 2, C, h, w]; images are read in threads, a batch ahead of the encoder."""

    def __init__(self, images: ImageMaker, vae: Vae, batch: int, dtype: str, threads: int):
        self.images = images
        self.vae = vae
        self.batch = batch
        self.dtype = dtype
        self.threads = threads

    def __call__(self, entries: Sequence[Entry]) -> Iterator[Made]:
        batches = [entries[i : i + self.batch] for i in range(0, len(entries), self.batch)]
        with ThreadPoolExecutor(self.threads) as pool:
            reading = [pool.submit(self.images.read, entry) for entry in batches[0]]
            for batch, following in pairwise([*batches, []]):
                reads = [each.result() for each in reading]
                reading = [pool.submit(self.images.read, entry) for entry in following]
                yield from self._encoded(batch, reads)

    def _encoded(self, entries: Sequence[Entry], reads: Sequence[Read | Unreadable]) -> Iterator[Made]:
        pixels = [read.square.pixels for read in reads if not isinstance(read, Unreadable)]
        posteriors = iter(self._posteriors(np.stack(pixels)) if pixels else ())
        for entry, read in zip(entries, reads, strict=True):
            if isinstance(read, Unreadable):
                yield Made(entry.name, read)
            else:
                yield Made(entry.name, (next(posteriors), entry.label), read.square.facts, read.caption)

    def _posteriors(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] -> [B, 2 views, 2, C, h, w]."""
        images = torch.from_numpy(pixels).to(torch.float32) / 127.5 - 1
        views = torch.stack([self.vae.encode(images), self.vae.encode(images.flip(-1))], dim=1)
        return views.cpu().numpy().astype(self.dtype)


def prepare_latents(
    source: Path,
    out: Path,
    vae: Vae,
    size: int = 256,
    batch: int = 16,
    dtype: Literal["float16", "float32"] = "float16",
    shard_size: int = 4096,
    threads: int = 1,
    crop_scale: Scale | None = None,
    wanted: Wanted | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Prepared | None:
    """Writes the posteriors of a source's images as shards [2, 2, C, size / 8, size / 8].

    Args:
        source: folder of class folders, or a tar of one, or a pattern of WebDataset shards.
        out: folder for the shards.
        vae: the encoder, on its device.
        size: pixels a side.
        batch: images encoded at once; with the device and its number of threads it decides the last bits.
        dtype: of the stored posteriors.
        shard_size: images a shard at most.
        threads: that read images.
        crop_scale, wanted: as for prepare_images.
        rank, world_size: of a launcher; the bytes do not depend on them.

    Returns:
        The finished set on rank 0, None on the others.

    Raises:
        UserError: as prepare_images; and a size that the autoencoder does not divide.
    """
    if min(batch, shard_size, threads) < 1:
        raise UserError(f"--batch, --shard-size and --workers must be at least 1; got {batch}, {shard_size} and {threads}")
    if size < 1 or size % vae.downsampling:
        raise UserError(f"--size {size}: must be a multiple of {vae.downsampling}, which the autoencoder divides it by")
    with open_source(source, out, wanted.kind if wanted else None) as listing:
        settings = {"size": size, "batch": batch, **crop_settings(crop_scale), **(wanted.settings() if wanted else {})}
        plan = _plan(listing, vae, size, dtype, shard_size, wanted is not None, settings)
        captions = Captions(listing.path, wanted.required) if wanted else None
        maker = LatentMaker(ImageMaker(listing.path, size, crop_scale, captions), vae, batch, dtype, threads)

        def measure(folder: Path, receipts: list[Receipt]) -> dict[str, Any]:
            return shift_and_scale(folder, receipts, plan.shape, dtype)

        prepared = prepare_set(out, plan, maker, measure, rank=rank, world_size=world_size)
        return replace(prepared, uncaptioned=list_uncaptioned(out, plan, captions)) if prepared and captions else prepared


def _plan(listing: Listing, vae: Vae, size: int, dtype: str, shard_size: int, captions: bool, settings: Mapping[str, Any]) -> Plan[Entry]:
    side = size // vae.downsampling
    return Plan(
        kind="latent",
        shape=(2, 2, vae.latent_channels, side, side),
        dtype=dtype,
        classes=listing.classes,
        source=Source(name=listing.name, xxh3=listing.xxh3),
        entries=listing.entries,
        shard_size=shard_size,
        vae=vae.record,
        facts=RECORDED,
        pixels=size,
        captions=captions,
        settings=settings,
    )


def shift_and_scale(folder: Path, receipts: list[Receipt], shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """What makes each channel of the sampled latents zero-mean and unit-variance, over both views of the whole set.

    shift = E[mean],  1 / scale^2 = Var[mean] + E[exp(logvar)]           (law of total variance; float64, sample after sample)

    Returns:
        latent_shift and latent_scale, [C] each, as the index holds them.
    """
    total, squares, noise, count = (np.zeros(shape[2]) for _ in range(4))
    for receipt in (r for r in receipts if r.shard.samples):
        for sample in array_view(folder / receipt.shard.file, receipt.shard, shape, dtype):
            mean, logvar = sample.astype(np.float64).transpose(1, 2, 0, 3, 4)  # [C, views, h, w] each
            total += mean.sum((1, 2, 3))
            squares += (mean**2).sum((1, 2, 3))
            noise += np.exp(logvar).sum((1, 2, 3))
            count += mean[0].size
    shift = total / count
    variance = squares / count - shift**2 + noise / count
    if not np.all(np.isfinite(variance)):
        raise UserError(f"{folder}: the autoencoder gave latents that are not finite in {dtype}; try --dtype float32, or check its weights")
    return {"latent_shift": tuple(shift.tolist()), "latent_scale": tuple((variance**-0.5).tolist())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `fasttrain prepare latents`."""
    parser.add_argument(
        "source", type=Path, help="folder with one sub-folder a class, or a tar of one (also .tar.xz), or WebDataset shards"
    )
    parser.add_argument("out", type=Path, help="folder to write the shards to")
    parser.add_argument("--vae", required=True, help="folder of an AutoencoderKL, or a hub id (then with --vae-revision)")
    parser.add_argument("--vae-revision", help="commit hash of a hub id")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the image (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images encoded at once (%(default)s)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored posteriors (%(default)s)")
    parser.add_argument("--shard-size", type=int, default=4096, help="images a shard at most (%(default)s)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="threads that read images (%(default)s, one a core)")
    add_crop_arguments(parser)
    add_caption_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Carries out `fasttrain prepare latents`, by itself or as one process of a launcher (RANK, WORLD_SIZE, LOCAL_RANK)."""
    rank, world_size, local_rank = (int(os.environ.get(name, alone)) for name, alone in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
    vae = Vae.load(args.vae, args.vae_revision, f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    prepared = prepare_latents(
        args.source,
        args.out,
        vae,
        args.size,
        args.batch,
        args.dtype,
        args.shard_size,
        args.workers,
        crop_scale_of(args),
        captions_wanted(args),
        rank=rank,
        world_size=world_size,
    )
    if prepared is not None:
        print(prepared.summary(args.out))
