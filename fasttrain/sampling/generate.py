"""Numbered samples: sample i is a pure function of (seed, i), its conditions and the weights, on any number of processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fasttrain_kernels.philox import Purpose, normal
from torch import Tensor

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.prediction import Prediction, given_scaled
from fasttrain.diffusion.schedule import Schedule
from fasttrain.errors import UserError
from fasttrain.sampling.asked import Asked
from fasttrain.sampling.guidance import Guidance, guided
from fasttrain.sampling.sampler import Model, Sampler

# A sample's draws are numbered within the upper bits of its Philox position; numbers of samples stay below.
DRAW = 1 << 40


class Samples(NamedTuple):
    """One batch of finished samples."""

    number: Tensor  # [b] int64, on the host
    cond: Cond  # of b, on the device: what was asked of them
    x0: Tensor  # [b, C, H, W] fp32, on the device


@dataclass(frozen=True, eq=False)
class Generator:
    """Everything that decides what the samples are, apart from their numbers.

    Noise and conditions depend on the sample's number only. The batch size changes neither, but a network may round differently at
    another batch size, as it does on another device.

    Args:
        model: (x_t [B, C, H, W], t [B], cond) -> [B, C, H, W], in evaluation mode.
        schedule, prediction: those of training.
        sampler: one of `SAMPLERS`.
        shape: (C, H, W) of a sample.
        conditions: of the samples, by number, on the seed's device.
        nothing: what the model is told where conditions are left out.
        guidance: how its conditions lead it.
        seed: [] int64 on the device where samples are made.
        dtype: of the model's input.
    """

    model: Model
    schedule: Schedule
    prediction: Prediction
    sampler: Sampler
    shape: tuple[int, int, int]
    conditions: Asked
    nothing: Nothing
    guidance: Guidance
    seed: Tensor
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def generate(
        self,
        count: int,
        batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Samples]:
        """This rank's share of the samples 0 .. count - 1.

        Args:
            count: how many samples all ranks make together.
            batch: samples a rank makes at once.
            progress: called after each batch with the number of samples this rank has added.

        Yields:
            Batches in increasing order of number; rank r holds every world_size-th number of a run of batch * world_size.

        Raises:
            UserError: a count or batch below 1, guidance that the model cannot follow, or a sampler that is not installed.
        """
        if not (1 <= count < DRAW and batch >= 1):
            raise UserError(f"cannot make {count} samples in batches of {batch}: give a count and a batch of at least 1")
        model = given_scaled(self.model, self.schedule, self.prediction)
        model = guided(model, self.guidance, self.nothing, self.schedule.num_timesteps)
        for numbers, wanted in _shares(count, batch, rank, world_size):
            there = numbers.to(self.seed.device)
            cond = self.conditions(there)
            x0 = self._sample(model, there, cond)
            if wanted:
                yield Samples(numbers, cond, x0)
                if progress is not None:
                    progress(len(numbers))

    def _sample(self, model: Model, numbers: Tensor, cond: Cond) -> Tensor:
        def noise(draw: int) -> Tensor:
            return normal(self.seed, numbers + draw * DRAW, self.shape, Purpose.SAMPLE)

        return self.sampler(model, self.schedule, self.prediction, noise, cond, self.dtype).float()


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
