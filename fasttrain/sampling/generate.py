"""Numbered samples: sample i is a pure function of (seed, i), its class and the weights, on any number of processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fasttrain_kernels.philox import Purpose, normal
from torch import Tensor

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.prediction import Prediction
from fasttrain.diffusion.schedule import Schedule
from fasttrain.errors import UserError
from fasttrain.sampling.guidance import Model, guided
from fasttrain.sampling.heun import Sampler


class Samples(NamedTuple):
    """One batch of finished samples."""

    number: Tensor  # [b] int64, on the host
    labels: Tensor  # [b] int64, on the host
    x0: Tensor  # [b, C, H, W] fp32, on the device


@dataclass(frozen=True, eq=False)
class Generator:
    """Everything that decides what the samples are, apart from their numbers.

    Noise and class depend on the sample's number only. The batch size changes neither, but a network may round differently at
    another batch size, as it does on another device.

    Args:
        model: (x_t [B, C, H, W], t [B], cond) -> [B, C, H, W], in evaluation mode.
        schedule, prediction: those of training.
        sampler: one of `SAMPLERS`.
        shape: (C, H, W) of a sample.
        num_classes: sample i is of class i % num_classes; 0 for an unconditional model.
        nothing: what the model is told where conditions are left out.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: [] int64 on the device where samples are made.
        dtype: of the model's input.
    """

    model: Model
    schedule: Schedule
    prediction: Prediction
    sampler: Sampler
    shape: tuple[int, int, int]
    num_classes: int
    nothing: Nothing
    guidance: float
    seed: Tensor
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def generate(
        self,
        count: int,
        batch: int,
        *,
        labels: Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Samples]:
        """This rank's share of the samples 0 .. count - 1.

        Args:
            count: how many samples all ranks make together.
            batch: samples a rank makes at once.
            labels: [count] int64, the class of each sample; by default they take turns.
            progress: called after each batch with the number of samples this rank has added.

        Yields:
            Batches in increasing order of number; rank r holds every world_size-th number of a run of batch * world_size.

        Raises:
            UserError: a count or batch below 1, or labels that are not one per sample and in range.
        """
        _require_sound(count, batch, labels, self.num_classes)
        model = guided(self.model, self.guidance, self.nothing)
        for numbers, wanted in _shares(count, batch, rank, world_size):
            classes = labels[numbers] if labels is not None else numbers % max(self.num_classes, 1)
            x0 = self._sample(model, numbers, classes)
            if wanted:
                yield Samples(numbers, classes, x0)
                if progress is not None:
                    progress(len(numbers))

    def _sample(self, model: Model, numbers: Tensor, classes: Tensor) -> Tensor:
        device = self.seed.device
        noise = normal(self.seed, numbers.to(device), self.shape, Purpose.SAMPLE)
        return self.sampler(model, self.schedule, self.prediction, noise, Cond(classes.to(device)), self.dtype).float()


def _shares(count: int, batch: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, bool]]:
    """The numbers of each of a rank's batches, and whether they are wanted.

    Every rank makes the same number of batches, because under ZeRO-3 each call of the model is a collective: a rank with nothing
    left repeats one sample of the others, unwanted.
    """
    together = batch * world_size
    for start in range(0, count, together):
        run = torch.arange(start, min(start + together, count))
        mine = run[rank::world_size]
        yield (mine, True) if len(mine) else (run[:1], False)


def _require_sound(count: int, batch: int, labels: Tensor | None, num_classes: int) -> None:
    if count < 1 or batch < 1:
        raise UserError(f"cannot make {count} samples in batches of {batch}: give a count and a batch of at least 1")
    if labels is None:
        return
    if labels.shape != (count,):
        raise UserError(f"{count} samples need {count} class labels, got {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= max(num_classes, 1):
        raise UserError(f"class labels must lie in [0, {max(num_classes, 1)}), got {labels.min().item()} to {labels.max().item()}")
