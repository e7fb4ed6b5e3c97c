"""The views of a rank's share: they cover the state once, are what DeepSpeed itself reports, and writing to them takes effect."""

from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.engine.deepspeed import build_engine
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER, TrainingState
from fasttrain.engine.optimizer import Clock, EmaConfig, OptimizerConfig
from tests.ranks import run_ranks
from tests.runs import zero

CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
CONFIG = OptimizerConfig(learning_rate=1e-2, ema=(EmaConfig(half_life=100), EmaConfig(half_life=1e6, ramp=None)))


def _engine(processes: Processes, stage: int, precision: str) -> tuple[Any, TrainingState]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5))
    optimizer = CONFIG.build(network.parameters())
    engine = build_engine(network, optimizer, zero(stage), micro_batch=4, accumulation_steps=1, precision=precision, clip=None)
    return engine, TrainingState(engine, stage, processes)


def _forward(engine: Any, precision: str) -> torch.Tensor:
    x = torch.linspace(-1, 1, 28).view(4, 7)
    return engine(x.to(torch.bfloat16 if precision == "bf16" else torch.float32)).float()


def _step(engine: Any, precision: str, update: int) -> None:
    engine.basic_optimizer.begin(Clock(update, update * 8, 8), 1e-2)
    engine.backward(_forward(engine, precision).square().mean())
    engine.step()


def _examine(processes: Processes) -> list[dict[str, Any]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = []
    for stage, precision in CASES:
        engine, state = _engine(processes, stage, precision)
        for update in (1, 2, 3):
            _step(engine, precision, update)
        full = {key: state.full(key) for key in state.keys}
        theirs = []
        if stage:
            for name, p in engine.module.named_parameters():
                theirs += [(full[MASTER][name], safe_get_full_fp32_param(p)), (full["ema"][name], safe_get_full_optimizer_state(p, "ema"))]
        for fragment in state.fragments:
            for key, view in fragment.state.items():
                view.copy_(full[key][fragment.name].view(-1)[fragment.start : fragment.start + fragment.numel] * 2)
        state.refresh_weights()
        after_doubling = _forward(engine, precision).detach().clone()
        found.append(
            {
                "owned": [(f.name, f.start, f.numel) for f in state.owned()],
                "shapes": state.shapes,
                "dtypes": {view.dtype for f in state.fragments for view in f.state.values()},
                "full": full,
                "theirs": [(mine, other.cpu().float()) for mine, other in theirs],
                "after_doubling": after_doubling,
            }
        )
        engine.destroy()
    return found


def _expected(weights: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
    network = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5))
    network.load_state_dict({name: tensor * 2 for name, tensor in weights.items()})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return network.to(dtype)(torch.linspace(-1, 1, 28).view(4, 7).to(dtype)).float().detach()


@pytest.mark.parametrize("world_size", [1, 3])
def test_fragments(world_size: int):
    per_rank = run_ranks(world_size, _examine)
    for (stage, precision), ranks in zip(CASES, zip(*per_rank, strict=True), strict=True):
        case = f"stage {stage}, {precision}, {world_size} ranks"
        covered = sorted(piece for rank in ranks for piece in rank["owned"])
        for name, shape in ranks[0]["shapes"].items():
            pieces = [(start, numel) for n, start, numel in covered if n == name]
            ends = [start + numel for start, numel in pieces]
            assert [start for start, _ in pieces] == [0, *ends[:-1]] and ends[-1] == torch.Size(shape).numel(), case
        assert ranks[0]["dtypes"] == {torch.float32}, case
        for rank in ranks:
            for mine, other in rank["theirs"]:
                assert torch.equal(mine, other), case
            assert torch.equal(rank["after_doubling"], _expected(rank["full"][MASTER], precision)), case
        # A half-life of a million images: the second average has hardly left the start, and yet it has moved.
        assert all(not torch.equal(ranks[0]["full"]["ema_1"][n], ranks[0]["full"][MASTER][n]) for n in ranks[0]["shapes"]), case
