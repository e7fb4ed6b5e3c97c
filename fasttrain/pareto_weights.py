"""Weights of timestep ranges that a run solves for from its own gradients, every so many steps: what weighting `pareto` asks for.

They are a function of the weights at that step, and of images and noise that are functions of the position. A checkpoint keeps them, so
that a resumed run goes on with the same, and solves anew at the same steps.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.config import RunConfig
from fasttrain.dataset import RunData
from fasttrain.diffusion.objective import Objective
from fasttrain.diffusion.timestep_weights import Pareto, Table, placed
from fasttrain.engine.activity import Activity
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.range_losses import Draws, RangeLosses, range_names
from fasttrain.research.frank_wolfe import least_norm
from fasttrain.research.gradients import range_gradients
from fasttrain.research.pareto import normalised, regularised
from fasttrain.research.ugd import Ugd

LEAST = 1e-3  # share of equal weights that every range keeps: none is left out of training


class ParetoWeights:
    """The weights in effect; nothing at all under other weightings.

    Args:
        config, data, processes, objective: the run's; the objective's weighting is exchanged when weights are solved for.
        batch: images of a forward pass.
        dtype: of the network's input.

    Raises:
        UserError: the run cannot solve for weights.
    """

    def __init__(self, config: RunConfig, data: RunData, processes: Processes, objective: Objective, batch: int, dtype: torch.dtype):
        asked = config.diffusion.weighting
        self.values: list[float] | None = None
        self._asked = asked if isinstance(asked, Pareto) else None
        if self._asked is None:
            return
        _check(config, processes)
        self._objective = objective
        self._schedule, self._processes, self._batch = config.diffusion.schedule, processes, batch
        self._losses = RangeLosses(config, data, processes, dtype=dtype)

    def before_step(self, step: int, position: int, network: nn.Module, activity: Activity) -> None:
        """Solves anew where it is time, on the images of `position` on. A collective."""
        if self._asked is None or (self.values is not None and (step - 1) % self._asked.every):
            return
        activity.begin("forward", step)
        self._put(self._solved(network, position, activity.renew))

    def restore(self, values: Sequence[float] | None) -> None:
        """Takes up what a checkpoint keeps; without any, the next step solves.

        Raises:
            UserError: they are of another number of ranges.
        """
        if self._asked is None or values is None:
            return
        if len(values) != self._asked.ranges:
            raise UserError(
                f"diffusion.weighting.ranges is {self._asked.ranges}, and the checkpoint's weights are of {len(values)} ranges: "
                "set it back, or choose another run_dir for a new run"
            )
        self._put(list(values))

    def record(self) -> dict[str, Any]:
        """What a report tells of them, by the timesteps of each range."""
        if self.values is None:
            return {}
        return {"weight_by_timestep": dict(zip(range_names(len(self.values), self._schedule.num_timesteps), self.values, strict=True))}

    def close(self) -> None:
        """Ends what reads for it."""
        if self._asked is not None:
            self._losses.close()

    def _put(self, values: list[float]) -> None:
        self.values = values
        self._objective.weighting = placed(Table(tuple(values)), self._schedule)

    def _solved(self, network: nn.Module, position: int, alive: Callable[[], None]) -> list[float]:
        asked = self._asked
        assert asked is not None
        draws = Draws(asked.ranges, asked.samples // 2, self._batch, position)

        def losses(number: int, half: int) -> Iterator[Tensor]:
            for loss in self._losses.batches(network, draws, number, half):
                alive()
                yield loss.loss

        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        found = range_gradients(trained, losses, asked.ranges, total=self._processes.sum)
        # Ranks sum in one order, but solve apart: one answer counts.
        return self._processes.from_main(weights_of(found.gram, asked))


def weights_of(gram: Tensor, asked: Pareto) -> list[float]:
    """The solution for these gradients, of mean 1; equal weights where they are not finite or all 0: the step itself will tell of that."""
    if not gram.isfinite().all() or not gram.diagonal().sum() > 0:
        return [1.0] * asked.ranges
    matrix = regularised(normalised(gram), asked.regularisation)
    solve = Ugd(asked.iterations, asked.rate).solve if asked.solver == "ugd" else least_norm
    weights = solve(matrix).weights.clamp(min=LEAST / asked.ranges)
    return (weights * asked.ranges / weights.sum()).tolist()


def _check(config: RunConfig, processes: Processes) -> None:
    asked = config.diffusion.weighting
    assert isinstance(asked, Pareto)
    if config.zero_stage == 3:
        raise UserError(
            "diffusion.weighting pareto takes gradients of each range apart, and under ZeRO 3 no rank holds the weights for that: "
            "set zero_optimization.stage to 2, or choose another weighting"
        )
    if config.diffusion.uncertainty:
        raise UserError("diffusion.weighting pareto and diffusion.uncertainty both decide how ranges count: remove one of them")
    if asked.samples % (2 * processes.world_size):
        raise UserError(
            f"diffusion.weighting.samples {asked.samples} do not go into two halves on {processes.world_size} processes: "
            f"choose a multiple of {2 * processes.world_size}"
        )
