"""The averages under ZeRO 0 to 3 are, bit for bit, those of a full copy kept beside the run from its own master weights.

ema = ema + (1 - decay)(p - ema), torch's `lerp`, as the update's reference documents it; a decay is a function of the position. The copy is
of whole parameters on one process; ZeRO's averages lie in flat partitions, in another order and at other alignments.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.diffusion.objective import Loss
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER
from fasttrain.engine.optimizer import ema_name
from fasttrain.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import GLOBAL_BATCH, plain_config, start, zero

STEPS, SKIPPED = 30, 12
MODEL = {"name": "vit", "depth": 1, "width": 28, "heads": 2, "patch": 2, "num_timesteps": 1000}  # sizes that no vector divides
AVERAGES = [{"half_life": 500}, {"half_life": 40, "ramp": None}, {"half_life": 5000, "ramp": 0.5}]


def _spoil(trainer: Trainer, step: int) -> None:
    """Makes the last rank's loss of that step NaN."""
    objective = trainer.objective

    def spoiled(*args: Any, **kwargs: Any) -> Loss:
        loss = objective(*args, **kwargs)
        last = trainer.processes.rank == trainer.processes.world_size - 1
        return loss._replace(loss=loss.loss * float("nan")) if last and trainer.progress.step + 1 == step else loss

    trainer.objective = spoiled  # type: ignore[assignment]


def _differences(processes: Processes, raw: dict[str, Any]) -> tuple[int, int, int]:
    """(steps taken, elements whose bits differ from the copy's in any average, elements that moved at all)."""
    trainer = start(processes, raw)
    _spoil(trainer, SKIPPED)
    copies = [trainer.state.full(MASTER) for _ in AVERAGES]
    first = trainer.state.full(MASTER)
    for _ in range(STEPS):
        before = trainer.progress.updates
        trainer.train_step()
        if trainer.progress.updates > before:
            _follow(trainer, copies)
    averages = [trainer.state.full(ema_name(i)) for i in range(len(AVERAGES))]
    differ = sum(int((average[name] != copy[name]).sum()) for average, copy in zip(averages, copies, strict=True) for name in copy)
    moved = sum(int((averages[1][name] != first[name]).sum()) for name in first)
    trainer.loader.close()
    trainer.engine.destroy()
    return trainer.progress.updates, differ, moved


def _follow(trainer: Trainer, copies: list[dict[str, torch.Tensor]]) -> None:
    """The same formula on whole parameters."""
    masters = trainer.state.full(MASTER)
    for average, copy in zip(trainer.config.optimizer.ema, copies, strict=True):
        share = 1 - average.decay(trainer.progress.position, GLOBAL_BATCH)
        for name, master in masters.items():
            copy[name].lerp_(master, share)


def _all(processes: Processes, raws: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    return [_differences(processes, raw) for raw in raws]


EVERY_STAGE = ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))


@pytest.mark.parametrize(("world_size", "cases"), [(1, ((0, "bf16"), (1, "fp32"), (3, "fp32"))), (2, EVERY_STAGE)])
def test_the_averages_are_a_full_copys_bit_for_bit(world_size: int, cases: tuple[tuple[int, str], ...], tmp_path: Path, digits: Path):
    raws = [
        plain_config(
            tmp_path / f"zero{stage}-{precision}",
            digits,
            deepspeed=zero(stage),
            model=MODEL,
            optimizer={"ema": AVERAGES},
            training={"precision": precision, "micro_batch": micro_batch, "clip": 1.0},
        )
        for (stage, precision), micro_batch in zip(cases, [4, 8] * 4, strict=False)
    ]
    parameters = None
    for raw, (updates, differ, moved) in zip(raws, run_ranks(world_size, _all, raws)[0], strict=True):
        told = f"{raw['deepspeed']} {raw['training']}"
        assert updates == STEPS - 1, told
        assert differ == 0, f"{differ} elements differ: {told}"
        parameters = parameters or moved
        assert moved > 0.5 * parameters > 0, "the averages moved"
