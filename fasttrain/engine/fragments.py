"""Where a rank's share of the training state lies: each parameter's fp32 master, moments and averages, viewed in ZeRO's partitions.

One description serves every stage, so that saving, loading at another stage or world size, and gathering an average are each written once:

    stage 0     every rank holds every parameter whole
    stage 1, 2  parameters are flattened in groups; a rank owns one contiguous partition of each group
    stage 3     each parameter is cut into world_size equal slices, the last one padded

The flat buffers are reached through DeepSpeed's optimizer objects (attributes checked at deepspeed 0.19.8; tests/engine hold them to it).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fasttrain.engine.distributed import Processes
from fasttrain.engine.optimizer import AdamWEMA

MASTER = "master"


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one parameter on this rank, flattened.

    Attributes:
        name: the parameter's name in the model.
        start: index of the first element within the flattened parameter.
        state: views into the live training state, each [numel] fp32: `master`, `exp_avg`, `exp_avg_sq`, `ema`, ...
    """

    name: str
    start: int
    state: dict[str, torch.Tensor]

    @property
    def numel(self) -> int:
        return self.state[MASTER].numel()


class TrainingState:
    """The fp32 state of a run, whatever the ZeRO stage: this rank's fragments, and how to bring the weights in line with them."""

    def __init__(self, engine: Any, stage: int, processes: Processes):
        self._engine, self._stage, self._processes = engine, stage, processes
        self._optimizer: AdamWEMA = engine.basic_optimizer
        self._names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}
        self.shapes = {name: list(_full_shape(p)) for name, p in engine.module.named_parameters() if p.requires_grad}
        self.keys = [MASTER, *self._optimizer.state_names()]
        self._optimizer.init_state(flat for flat, _ in self._partitions())
        self.fragments = [fragment for flat, pieces in self._partitions() for fragment in self._views(flat, pieces)]

    def owned(self) -> list[Fragment]:
        """The fragments that this rank writes to a checkpoint: together, the ranks' cover every element once."""
        if self._stage > 0:
            return self.fragments
        return self.fragments[self._processes.rank :: self._processes.world_size]

    def full(self, key: str) -> dict[str, torch.Tensor]:
        """Every parameter's `key` state whole, fp32 on the CPU, on every rank. A collective."""
        mine: dict[str, list[Fragment]] = {}
        for fragment in self.owned():
            mine.setdefault(fragment.name, []).append(fragment)
        return {name: self._gather(mine.get(name, []), key, shape) for name, shape in self.shapes.items()}

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What every rank holds alike, by name: what the model computes with, and at stage 0 the whole state. Not at stage 3."""
        yield from self._engine.module.named_parameters()
        yield from self._engine.module.named_buffers()
        if self._stage == 0:
            yield from ((f"{fragment.name} ({key})", view) for fragment in self.fragments for key, view in fragment.state.items())

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Brings the weights that the model computes with in line with masters that were written to. A collective."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            for low, master in self._whole_parameters():
                if low is not master:
                    low.data.copy_(master.data)
        elif self._stage in (1, 2):
            optimizer.update_lp_params()
        else:
            optimizer._partition_all_parameters()
            for i in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _views(self, flat: torch.Tensor, pieces: list[tuple[torch.Tensor, int, int, int]]) -> Iterator[Fragment]:
        sources = {MASTER: flat.data, **self._optimizer.state[flat]}
        for parameter, start, offset, numel in pieces:
            if numel > 0:
                yield Fragment(
                    self._names[id(parameter)], start, {key: sources[key].view(-1).narrow(0, offset, numel) for key in self.keys}
                )

    def _partitions(self) -> Iterator[tuple[torch.Tensor, list[tuple[torch.Tensor, int, int, int]]]]:
        """Each tensor that the base optimizer updates, with the pieces in it: (parameter, start in it, offset in the tensor, elements)."""
        if self._stage == 0:
            for low, master in self._whole_parameters():
                yield master, [(low, 0, 0, low.numel())]
        elif self._stage in (1, 2):
            yield from self._partitions_of_stage_1_and_2()
        else:
            yield from self._partitions_of_stage_3()

    def _whole_parameters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        masters = [p for group in self._optimizer.param_groups for p in group["params"]]
        low_groups = getattr(self._engine.optimizer, "fp16_groups", None)  # bf16 weights; in fp32 the masters are the weights
        low = masters if low_groups is None else [p for group in low_groups for p in group]
        return zip(low, masters, strict=True)

    def _partitions_of_stage_1_and_2(self) -> Iterator[tuple[torch.Tensor, list[tuple[torch.Tensor, int, int, int]]]]:
        optimizer = self._engine.optimizer
        for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            mapped = [(p, p._hp_mapping) for p in parameters if p._hp_mapping is not None]
            yield flat, [(p, m.lp_fragment_address.start, m.hp_fragment_address.start, m.hp_fragment_address.numel) for p, m in mapped]

    def _partitions_of_stage_3(self) -> Iterator[tuple[torch.Tensor, list[tuple[torch.Tensor, int, int, int]]]]:
        optimizer = self._engine.optimizer
        rank = self._processes.rank
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            pieces = []
            for p in parameters:
                _, offset, slice_numel = optimizer.grad_position[optimizer.get_param_id(p)]
                start = slice_numel * rank
                pieces.append((p, start, offset, min(slice_numel, p.ds_numel - start)))
            yield flat, pieces

    def _gather(self, fragments: list[Fragment], key: str, shape: list[int]) -> torch.Tensor:
        whole = torch.zeros(int(torch.Size(shape).numel()), dtype=torch.float32, device=self._processes.device)
        for fragment in fragments:
            whole[fragment.start : fragment.start + fragment.numel] = fragment.state[key]
        return self._processes.sum(whole).view(shape).cpu()


def _full_shape(parameter: torch.Tensor) -> torch.Size:
    """A parameter's shape in the model, also where ZeRO-3 holds only a slice of it."""
    return getattr(parameter, "ds_shape", parameter.shape)
