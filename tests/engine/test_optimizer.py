"""DeepSpeed's update with our optimizer against a plain loop over torch's own AdamW, and the arithmetic of averages and rates."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.engine.deepspeed import build_engine, gradient_norm
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER, TrainingState
from fasttrain.engine.optimizer import Clock, EmaConfig, OptimizerConfig
from tests.ranks import run_ranks
from tests.runs import zero

STEPS, BATCH, CLIP, SKIPPED = 8, 16, 0.5, 3
CONFIG = OptimizerConfig(
    learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, ema=(EmaConfig(half_life=40), EmaConfig(half_life=200, ramp=None))
)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5))


def _groups(network: nn.Module, two: bool) -> list[dict[str, Any]]:
    """One group, or matrices with weight decay and vectors without."""
    if not two:
        return [{"params": list(network.parameters())}]
    matrices, vectors = ([p for p in network.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def _batch(step: int, skip: bool) -> torch.Tensor:
    x = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))
    return x * float("nan") if skip and step == SKIPPED else x


def _loss(y: torch.Tensor) -> torch.Tensor:
    return (y - 1).square().mean() * 10


def plain_loop(two_groups: bool, skip: bool) -> dict[str, list[torch.Tensor]]:
    """The same training in plain torch: AdamW, clipping, averages, and no step where the gradient is not finite."""
    network = _network()
    optimizer = torch.optim.AdamW(
        _groups(network, two_groups), lr=0.0, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=CONFIG.weight_decay
    )
    averages = [[p.detach().clone() for p in network.parameters()] for _ in CONFIG.ema]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate * (step + 1) / STEPS
        optimizer.zero_grad()
        _loss(network(_batch(step, skip))).backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        if not torch.isfinite(norm):
            continue
        optimizer.step()
        position = (step + 1) * BATCH
        for ema, average in zip(CONFIG.ema, averages, strict=True):
            half_life = ema.half_life if ema.ramp is None else min(ema.half_life, ema.ramp * position)
            keep = math.exp(math.log(0.5) * BATCH / half_life)
            for a, p in zip(average, network.parameters(), strict=True):
                a.copy_(keep * a + (1 - keep) * p.detach())
    return {MASTER: [p.detach() for p in network.parameters()], "ema": averages[0], "ema_1": averages[1]}


def _with_deepspeed(
    processes: Processes, stage: int, accumulation: int, two_groups: bool, skip: bool
) -> tuple[dict[str, Any], int, list[float | None]]:
    network = _network()
    micro_batch = BATCH // (accumulation * processes.world_size)
    optimizer = CONFIG.build(_groups(network, two_groups))
    engine = build_engine(
        network, optimizer, zero(stage), micro_batch=micro_batch, accumulation_steps=accumulation, precision="fp32", clip=CLIP
    )
    state, updates, norms = TrainingState(engine, stage, processes), 0, []
    for step in range(STEPS):
        optimizer.begin(Clock(updates + 1, (step + 1) * BATCH, BATCH), CONFIG.learning_rate * (step + 1) / STEPS)
        mine = _batch(step, skip)[processes.rank :: processes.world_size]
        for micro in mine.split(micro_batch):
            engine.backward(_loss(engine(micro)))
            engine.step()
        updates += int(engine.was_step_applied())
        norms.append(gradient_norm(engine))
    full = {key: list(state.full(key).values()) for key in (MASTER, "ema", "ema_1")}
    engine.destroy()
    return full, updates, norms


def _cases(processes: Processes) -> list[Any]:
    return [_with_deepspeed(processes, *case) for case in CASES]


CASES = [
    (stage, accumulation, two, skip)
    for stage in (0, 1, 2, 3)
    for accumulation, two, skip in ((1, False, False), (4, True, False), (2, True, True))
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeed_updates_as_a_plain_loop_does(world_size: int):
    results = run_ranks(world_size, _cases)[0]
    for (stage, accumulation, two_groups, skip), (state, updates, norms) in zip(CASES, results, strict=True):
        expected = plain_loop(two_groups, skip)
        assert updates == STEPS - int(skip)
        assert [math.isfinite(n) for n in norms] == [not (skip and step == SKIPPED) for step in range(STEPS)]
        for key, tensors in expected.items():
            for got, want in zip(state[key], tensors, strict=True):
                case = f"{key}, stage {stage}, accumulation {accumulation}, two groups {two_groups}, skip {skip}"
                torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-7, msg=lambda text, case=case: f"{case}: {text}")


def test_a_decay_without_ramp_is_the_papers():
    papers = EmaConfig(half_life=256 * math.log(0.5) / math.log(0.9999), ramp=None)
    assert papers.decay(position=1, images=256) == pytest.approx(0.9999, abs=1e-12)
    assert papers.half_life == pytest.approx(1_774_000, rel=1e-3)


def test_the_ramp_forgets_the_random_start():
    ema, kept = EmaConfig(half_life=1e6), 1.0
    for step in range(1, 1001):
        kept *= ema.decay(position=step * 256, images=256)
    assert kept < 1e-9
    assert EmaConfig(half_life=1e6).decay(10**9, 256) == 0.5 ** (256 / 1e6)


@pytest.mark.parametrize(("decay", "middle", "end"), [("constant", 1.0, 1.0), ("cosine", 0.5, 0.0), ("linear", 0.5, 0.0)])
def test_the_rate_warms_up_and_decays(decay: str, middle: float, end: float):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay=decay)
    assert [config.rate(step, 110) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    assert config.rate(60, 110) == pytest.approx(2 * middle)
    assert config.rate(110, 110) == pytest.approx(2 * end)
