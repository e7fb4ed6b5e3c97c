"""A run's unweighted x0 loss, range of timesteps by range: what the analyses of its gradients and of fine-tuning measure."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasttrain.building import build_objective
from fasttrain.config import RunConfig
from fasttrain.data.loader import Loader
from fasttrain.dataset import RunData
from fasttrain.diffusion.objective import Loss, Model, Objective
from fasttrain.diffusion.weighting import Const
from fasttrain.diffusion.window import Window
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError

# Noise and timesteps are drawn under another key than training's, held-out looks' and samples'.
RANGE_KEY = 0x72616E67


@dataclass(frozen=True)
class Draws:
    """Which samples a range's loss is taken of.

    Attributes:
        ranges: K, equal parts of the path.
        samples: of each half of each range's; a multiple of the processes.
        batch: samples of a forward pass on each process, at most.
        first: position of the first: draws that start apart share no noise.
    """

    ranges: int
    samples: int
    batch: int
    first: int = 0

    @property
    def after(self) -> int:
        """The position after the last."""
        return self.first + 2 * self.ranges * self.samples

    def start(self, number: int, half: int) -> int:
        """Position of the first of a range's half: no two share a position."""
        return self.first + (2 * number + half) * self.samples

    def batches(self, world_size: int) -> tuple[int, int]:
        """(samples of a process's micro-batch, how many micro-batches): all of one size, so that each counts alike.

        Raises:
            UserError: the samples cannot be dealt so.
        """
        mine, rest = divmod(self.samples, world_size)
        if rest or not mine:
            raise UserError(f"{2 * self.samples} samples a range do not go into two halves on {world_size} processes: change their number")
        size = next(size for size in range(min(self.batch, mine), 0, -1) if mine % size == 0)
        return size, mine // size


class RangeLosses:
    """The x0 losses of a network on a run's images, with its conditions left out as in training.

    Args:
        config, data: the run's; its training images, or its held-out ones.
        processes: each takes its share of the samples.
        dtype: of the network's input.
    """

    def __init__(self, config: RunConfig, data: RunData, processes: Processes, held_out: bool = False, dtype: torch.dtype = torch.float32):
        self._processes, self._dtype = processes, dtype
        quiet = config.model_copy(update={"data": config.data.model_copy(update={"threads": 0})})  # few batches at a time are asked for
        seed = torch.tensor(config.seed, device=processes.device)
        self._loader: Loader = data.held_out_loader(quiet, seed) if held_out else data.training_loader(quiet, seed)
        self._config, self._empty, self._seed = config, data.empty, seed
        self._objectives: dict[tuple[int, int], Objective] = {}

    def batches(self, network: Model, draws: Draws, number: int, half: int) -> Iterator[Loss]:
        """The losses of this process's micro-batches of a range's half: the same at each call."""
        size, count = draws.batches(self._processes.world_size)
        objective = self._objective(draws.ranges, number)
        images = self._loader.batches(draws.start(number, half), size, self._processes.rank, self._processes.world_size)
        for _ in range(count):
            batch = next(images)
            yield objective(network, batch.x0(self._seed), batch.cond, batch.position, dtype=self._dtype)

    def _objective(self, ranges: int, number: int) -> Objective:
        if (ranges, number) not in self._objectives:
            window = Window(number / ranges, (number + 1) / ranges)
            diffusion = self._config.diffusion.model_copy(update={"weighting": Const(), "timesteps": window})
            config = self._config.model_copy(update={"diffusion": diffusion})
            self._objectives[ranges, number] = build_objective(config, self._seed ^ RANGE_KEY, self._empty)
        return self._objectives[ranges, number]

    @torch.no_grad()
    def means(self, network: nn.Module, draws: Draws) -> Tensor:
        """Each sample's loss, by range: [K, 2 samples] float64, on every process, in no particular order but the same at each call."""
        rows = []
        for number in range(draws.ranges):
            mine = torch.cat([loss.weighted.double() for half in range(2) for loss in self.batches(network, draws, number, half)]).cpu()
            rows.append(torch.cat(self._processes.gather(mine)))
        return torch.stack(rows)

    def close(self) -> None:
        self._loader.close()


def range_names(ranges: int, num_timesteps: int) -> list[str]:
    """What each range holds: its first and last timestep."""
    edges = [-(-k * num_timesteps // ranges) for k in range(ranges + 1)]
    return [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]
