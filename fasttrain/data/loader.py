"""Batches in the order of their positions: gathered whole in threads, pinned, copied ahead, transformed on the device.

    positions -> order.sample_ids -> ShardSet.gather -> [pin, copy on a side stream] -> transform -> Batch
                 \\_____________ in a thread, some batches ahead ____________________/   \\_ in the caller's stream

The i-th micro-batch of rank r holds the positions start + i * micro_batch * world_size + r + world_size * arange(micro_batch), so the
first position is all there is to resume from, and the order knows neither threads nor ranks.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from fasttrain_kernels.dispatch import Kernels
from fasttrain_kernels.latent_noising import Posterior
from torch import Tensor

from fasttrain.cond import Cond
from fasttrain.data.conditions import Captions, Conditions, Controls
from fasttrain.data.config import DataConfig
from fasttrain.data.crops import Crops, crops_of
from fasttrain.data.order import HeldOut, Order, SampleOrder
from fasttrain.data.shards import ShardSet
from fasttrain.data.substitutes import replace_unreadable
from fasttrain.data.text.table import TextTable
from fasttrain.data.transform import build_transform
from fasttrain.errors import UserError


class Batch(NamedTuple):
    """A micro-batch: everything on the device but sample_id, which stays on the host."""

    clean: Tensor | Posterior  # x0 [B, C, H, W] fp32, or the stored posteriors that it is drawn from
    cond: Cond  # classes, and whatever else the samples come with
    position: Tensor  # [B] int64
    sample_id: Tensor  # [B] int64, of what was really used

    def x0(self, seed: Tensor) -> Tensor:
        """x0 [B, C, H, W] fp32: of latents the draw that training makes under the run's `seed` [] int64."""
        return self.clean if isinstance(self.clean, Tensor) else self.clean.sample(seed, self.position)


class _Raw(NamedTuple):
    """A gathered batch on its way: what is on the device, by name, once `copied` has passed."""

    on_device: dict[str, Tensor]
    sample_id: Tensor
    replaced: int
    copied: torch.cuda.Event | None


def positions_of(start: int, batch: int, micro_batch: int, rank: int, world_size: int) -> np.ndarray:
    """The positions of a rank's `batch`-th micro-batch after `start`: int64 [micro_batch]."""
    return start + batch * micro_batch * world_size + rank + world_size * np.arange(micro_batch, dtype=np.int64)


class Loader:
    """Reads a set of shards in an order; a context manager, whose threads end with it.

    Args:
        shards: what to read.
        order: which sample stands at which position.
        transform: (stored or cut [B, *shape], position [B]) on the device -> x0 [B, C, H, W] fp32, or what it is drawn from.
        device: where batches go; on CUDA through pinned memory and a stream of its own.
        threads: that gather; 0 gathers in the caller. Any number gives the same batches in the same order.
        ahead: batches gathered before they are asked for, where there are threads.
        conditions: what samples come with; default: their labels alone.
        crops: what the model sees of stored images; None: all of them, as they are.

    Attributes:
        replaced: positions given so far whose sample could not be read, and was replaced by another.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        transform: Callable[[Tensor, Tensor], Tensor | Posterior],
        device: torch.device | str = "cpu",
        threads: int = 1,
        ahead: int = 4,
        conditions: Conditions | None = None,
        crops: Crops | None = None,
    ):
        self.shards = shards
        self.order = order
        self.transform = transform
        self.conditions, self.crops = conditions or Conditions(), crops
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fasttrain-loader") if threads else None
        self._ahead = ahead
        self.replaced = 0

    def batches(self, start_position: int, micro_batch: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Endless micro-batches of a rank from a position on.

        Raises (from the iterator, in the caller):
            UserError: more of the set is unreadable than may be, or a passing failure lasted too long.
        """
        if micro_batch < 1 or start_position < 0 or not 0 <= rank < world_size:
            told = f"micro_batch {micro_batch}, start_position {start_position}, rank {rank}, world_size {world_size}"
            raise ValueError(f"micro_batch must be positive, start_position >= 0 and 0 <= rank < world_size; got {told}")
        return (self._finish(raw) for raw in self._raw(self._jobs(start_position, micro_batch, rank, world_size)))

    def _jobs(self, start_position: int, micro_batch: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
        """The positions of batch after batch; says on the way which shards come next."""
        said = None
        for number in itertools.count():
            positions = positions_of(start_position, number, micro_batch, rank, world_size)
            first = int(positions[0])
            if self.order.stretch(first) != said:
                said = self.order.stretch(first)
                coming = self.order.shards_ahead(first, rank, world_size)
                self.shards.ahead(coming)
                self.conditions.ahead(self.shards.spans(coming))
            yield positions

    def _raw(self, jobs: Iterator[np.ndarray]) -> Iterator[_Raw]:
        if self._pool is None:
            yield from map(self._gather, jobs)
            return
        pending: deque[Future[_Raw]] = deque()
        try:
            while True:
                while len(pending) < self._ahead:
                    pending.append(self._pool.submit(self._gather, next(jobs)))
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _gather(self, positions: np.ndarray) -> _Raw:
        ids = self.order.sample_ids(positions)
        ids, found, replaced = replace_unreadable(self.shards.gather, self.order.substitutes, positions, ids)
        host = {"stored": found.arrays, "labels": found.labels, "position": positions}
        box = None if self.crops is None else self.crops.boxes(positions)
        if box is not None:
            host["box"] = box
        host |= self.conditions.gather(ids, box)
        on_device, copied = self._copy({name: torch.from_numpy(array) for name, array in host.items()})
        return _Raw(on_device, torch.from_numpy(ids), replaced, copied)

    def _copy(self, host: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        if self._stream is None:
            return host, None
        with torch.cuda.stream(self._stream):
            moved = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in host.items()}
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return moved, copied

    def _finish(self, raw: _Raw) -> Batch:
        if raw.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(raw.copied)
            for tensor in raw.on_device.values():
                # The copy's stream owns this memory: it must not be used again before the consumer's stream is done with it.
                tensor.record_stream(current)
        arrays = raw.on_device
        self.replaced += raw.replaced
        stored, position = arrays["stored"], arrays["position"]
        images = stored if self.crops is None else self.crops.cut(stored, arrays["box"])
        cond = self.conditions.finish(arrays["labels"], arrays, position)
        return Batch(self.transform(images, position), cond, position, raw.sample_id)

    def close(self) -> None:
        """Ends the threads; batches not yet gathered are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def training_loader(
    config: DataConfig,
    shards: ShardSet,
    seed: Tensor,
    kernels: Kernels | None = None,
    controls: Iterable[str] = (),
    text: TextTable | None = None,
) -> Loader:
    """The loader of a run's training samples, on the seed's device.

    Args:
        config: the `data:` section.
        shards: ShardSet.open(config.train, config).
        seed: [] int64 of the run; keys the order, the crops and the flips of images.
        kernels: the implementation of each operation; default: auto for all.
        controls: names of `cond.CONTROLS` that the model takes.
        text: the samples' captions, for a model that takes them.

    Raises:
        UserError: nothing left to train on beside the held-out samples; or data that cannot be cropped so, or lacks a control.
    """
    kept = len(shards) - config.held_out
    if kept < 1:
        raise UserError(f"data.held_out: {config.held_out} of the {len(shards)} samples in {config.train}; leave some to train on")
    order = Order(kept, shards.index.shard_samples, int(seed), config.streams, config.window_shards)
    return _loader(config, shards, order, config.flip, seed, kernels or Kernels(), controls, text)


def held_out_loader(
    config: DataConfig,
    shards: ShardSet,
    seed: Tensor,
    kernels: Kernels | None = None,
    controls: Iterable[str] = (),
    text: TextTable | None = None,
) -> Loader:
    """The loader of the held-out samples, never mirrored: position n is the n-th of them, over and over. Arguments as `training_loader`.

    Raises:
        UserError: data.held_out is 0, or more than there are.
    """
    if not 0 < config.held_out <= len(shards):
        raise UserError(f"data.held_out: {config.held_out} of the {len(shards)} samples in {config.train}; give 1 or more, and leave some")
    order = HeldOut(len(shards), config.held_out, int(seed))
    return _loader(config, shards, order, False, seed, kernels or Kernels(), controls, text)


def _loader(
    config: DataConfig,
    shards: ShardSet,
    order: SampleOrder,
    flip: bool,
    seed: Tensor,
    kernels: Kernels,
    controls: Iterable[str],
    text: TextTable | None,
) -> Loader:
    impl = kernels.of("uniform")
    transform = build_transform(shards.index, seed, flip, config.normalise, impl)
    crops = crops_of(config, shards.index, int(seed))
    size = crops.size if crops else shards.index.pixels
    conditions = Conditions(
        captions=Captions(text, config.text_padding, seed, kernels.of("text_padding")) if text else None,
        controls=Controls(shards, controls, size, flip, seed, impl) if controls else None,
    )
    return Loader(shards, order, transform, seed.device, config.threads, config.ahead, conditions, crops)
