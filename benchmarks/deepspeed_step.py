"""The same training step through DeepSpeed (ZeRO-1, one process), beside the one without: what its hooks and its own waits cost."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.categories import host_waits, profiled
from benchmarks.networks import batch_of, build_network, our_objective, wake
from benchmarks.step_arms import ARMS, OURS, StepArm, timed_steps
from benchmarks.timing import flat, ratio, spread, synchronize
from benchmarks.updates import BETAS, EPS, LR, WEIGHT_DECAY, TrainingState
from fasttrain.models import Transformer

SETTINGS = {"zero_optimization": {"stage": 1}}
WARM_UP = 3
AGREE = 5e-3
"""Relative, of the first loss: the weights are the same, rounded to bf16 by one and by the other."""
WITH, WITHOUT = "ours, compiled, DeepSpeed ZeRO-1", "ours, compiled"


MISSING = "deepspeed is not installed"


@contextmanager
def group() -> Iterator[None]:
    """The process group of one that DeepSpeed needs, where it is installed: once a process, since DeepSpeed remembers its groups."""
    if importlib.util.find_spec("deepspeed") is None:
        yield
        return
    from fasttrain.engine import distributed

    distributed.start(timeout_seconds=600)
    try:
        yield
    finally:
        distributed.finish()


def measure(config: Transformer, batch: int, rounds: int, steps: int, backend: str, attention: str, device: torch.device) -> dict[str, Any]:
    """Both arms in turns, within `group`; the one through DeepSpeed with its profile and its waits."""
    if importlib.util.find_spec("deepspeed") is None:
        return {"not_run": MISSING}
    torch.compiler.reset()
    torch.manual_seed(0)
    network = build_network(config, OURS, attention, device)
    wake(network)
    weights = {name: t.detach().clone() for name, t in network.state_dict().items()}
    plain = StepArm(ARMS[WITHOUT], config, TrainingState.of(network), batch, device, backend=backend, attention=attention)
    through = _through_deepspeed(config, weights, batch, backend, attention, device)
    first = {WITHOUT: _first_loss(plain), WITH: through().item()}
    off = abs(first[WITH] - first[WITHOUT]) / abs(first[WITHOUT])
    if not off <= AGREE:
        return {"refused": {WITH: f"the first loss differs by {off:.2e}, allowed {AGREE}"}, "first_loss": first}
    calls: dict[str, Callable[[], Any]] = {WITHOUT: plain.step, WITH: through}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    synchronize(device)
    series = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            series[name].append(timed_steps(call, steps, device))
    seconds = {name: spread(flat(taken)) for name, taken in series.items()}
    figures = {name: {"step": {"seconds": s}, "images_per_second": batch / s["median"]} for name, s in seconds.items()}
    figures[WITH] |= {"profile": profiled(through, device), "host_waits": host_waits(through, device)}
    return {"arms": figures, "with_over_without": ratio(series[WITH], series[WITHOUT]), "first_loss": first}


def _first_loss(arm: StepArm) -> float:
    """The loss of the arm's first batch, before any update."""
    loss = arm.loss().item()
    arm.begin()
    return loss


def _through_deepspeed(
    config: Transformer, weights: dict[str, Tensor], batch: int, backend: str, attention: str, device: torch.device
) -> Callable[[], Tensor]:
    """One step through the project's engine, as the trainer makes it; gives the loss."""
    from fasttrain.engine.deepspeed import build_engine
    from fasttrain.engine.optimizer import Clock, EmaConfig, OptimizerConfig

    network = build_network(config, OURS, attention, device)
    network.load_state_dict(weights)
    network.compile(backend=backend, dynamic=False)
    settings = OptimizerConfig(
        learning_rate=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, ema=(EmaConfig(half_life=1e5, ramp=None),)
    )
    optimizer = settings.build(p for p in network.parameters() if p.requires_grad)
    engine = build_engine(network, optimizer, SETTINGS, micro_batch=batch, accumulation_steps=1, precision="bf16", clip=None)
    objective, (x0, cond, position) = our_objective(config, OURS, device), batch_of(config, batch, device)
    done = [0]

    def step() -> Tensor:
        done[0] += 1
        optimizer.begin(Clock(done[0], done[0] * batch, batch), LR)
        position.add_(batch)
        loss = objective(engine, x0, cond, position)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step
