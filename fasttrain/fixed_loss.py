"""A run's own training loss on samples that never change: what its landscape is a landscape of."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fasttrain.building import build_objective
from fasttrain.config import RunConfig
from fasttrain.data.loader import Loader
from fasttrain.dataset import RunData
from fasttrain.diffusion.objective import Loss, Model
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError

# Noise, timesteps and what is left out are drawn under another key than training's.
FIXED_KEY = 0x66697865


class FixedLoss:
    """The weighted loss as the run trains on it, on the same images with the same noise, timesteps and conditions each time.

    Their positions lie behind the run's last one: a curriculum over timesteps is then where the run's end leaves it, whichever checkpoint
    is looked at. A learned uncertainty is no part of it: a network that is looked at predicts without one.

    Args:
        config, data: the run's; its training images, or its held-out ones.
        processes: each takes its share of the samples.
        samples: how many; a multiple of the processes.
        batch: of them at once on each process, at most.
        held_out: the images.

    Raises:
        UserError: samples that cannot be dealt to the processes, or a run that keeps no held-out images.
    """

    def __init__(self, config: RunConfig, data: RunData, processes: Processes, samples: int, batch: int, held_out: bool = False):
        mine, rest = divmod(samples, processes.world_size)
        if rest or not mine:
            raise UserError(f"{samples} samples do not go evenly to {processes.world_size} processes: change their number")
        self._size = next(size for size in range(min(batch, mine), 0, -1) if mine % size == 0)  # of one size, so that each counts alike
        self._count = mine // self._size
        self._processes = processes
        self._first = config.training.steps * config.training.global_batch
        self._seed = torch.tensor(config.seed, device=processes.device)
        quiet = config.model_copy(update={"data": config.data.model_copy(update={"threads": 0})})  # few batches at a time are asked for
        self._objective = build_objective(config, self._seed ^ FIXED_KEY, data.empty)
        self._loader: Loader = data.held_out_loader(quiet, self._seed) if held_out else data.training_loader(quiet, self._seed)

    def batches(self, network: Model) -> Iterator[Loss]:
        """The losses of this process's micro-batches, all of one size."""
        images = self._loader.batches(self._first, self._size, self._processes.rank, self._processes.world_size)
        for _ in range(self._count):
            batch = next(images)
            yield self._objective(network, batch.x0(self._seed), batch.cond, batch.position, dtype=torch.float32)

    def minimised(self, network: Model) -> Iterator[Tensor]:
        """The weighted loss of each micro-batch: differentiable."""
        return (loss.loss for loss in self.batches(network))

    @torch.no_grad()
    def mean(self, network: nn.Module) -> float:
        """The weighted loss over all samples of all processes. A collective."""
        losses = torch.stack([loss.double() for loss in self.minimised(network)])
        return float(self._processes.sum(losses.mean()[None])) / self._processes.world_size

    def close(self) -> None:
        self._loader.close()
