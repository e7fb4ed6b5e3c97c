"""Whether an arm of the step benchmark computes what it should: loss and every gradient, before it is given a speed.

The truth is the same network in fp32 with the same (bf16-representable) weights on the same noisy input. An arm may be off by twice what
the plain bf16 network is, tensor by tensor, and a small floor: two roundings of the same value differ.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.capture import captured
from benchmarks.networks import batch_of
from fasttrain.cond import Cond
from fasttrain.models import Transformer

FLOOR = 2e-3
"""Of a tensor's norm: half a unit in the last place of bf16."""
CHUNK = 8
"""Images of the truth at a time: its activations are in fp32."""


@dataclass(frozen=True)
class Probe:
    """A fixed noisy input and what should be predicted from it."""

    x_t: Tensor
    t: Tensor
    cond: Cond
    target: Tensor

    @classmethod
    def of(cls, config: Transformer, batch: int, device: torch.device) -> "Probe":
        """Halfway between data and noise, at timesteps from all of the schedule."""
        x0, cond, _ = batch_of(config, batch, device, seed=7)
        eps = torch.randn(x0.shape, generator=torch.Generator(device).manual_seed(8), device=device)
        t = torch.arange(batch, device=device) * 997 % 1000
        return cls((x0 + eps).mul(0.5**0.5).bfloat16(), t, cond, (eps - x0) * 0.5**0.5)

    def part(self, first: int, count: int) -> "Probe":
        """Some of its images."""
        some = slice(first, first + count)
        return Probe(self.x_t[some], self.t[some], self.cond[some], self.target[some])

    def loss(self, model: Any) -> Tensor:
        """Mean squared error of the prediction."""
        return (model(self.x_t, self.t, self.cond).float() - self.target).square().mean()


@dataclass(frozen=True)
class Found:
    """A loss and the gradient of every trained parameter."""

    loss: float
    gradients: list[Tensor]


def found(model: Any, parameters: list[nn.Parameter], probe: Probe, chunk: int | None = None) -> Found:
    """Loss and gradients of a network on the probe, in parts of `chunk` images."""
    size, total = probe.x_t.shape[0], 0.0
    _forget(parameters)
    for first in range(0, size, chunk or size):
        part = probe.part(first, chunk or size)
        loss = probe.loss(model) if chunk is None else part.loss(model) * (part.x_t.shape[0] / size)
        loss.backward()
        total += loss.item()
    return Found(total, _taken(parameters))


def found_replayed(model: Any, parameters: list[nn.Parameter], probe: Probe) -> Found:
    """The same of a network captured as a CUDA graph, from a replay into memory that held NaN before."""

    def run() -> tuple[Tensor, list[Tensor]]:
        _forget(parameters)
        loss = probe.loss(model)
        loss.backward()
        return loss.detach(), _taken(parameters)

    graph, (loss, gradients) = captured(run, probe.x_t.device)
    for written in (loss, *gradients):
        written.fill_(float("nan"))
    graph.replay()
    found = Found(loss.item(), [gradient.clone() for gradient in gradients])
    del loss, gradients
    graph.reset()
    return found


def _forget(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _taken(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Every parameter's gradient, which it keeps no longer."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    _forget(parameters)
    return gradients


def fault(arm: Found, plain: Found, truth: Found, names: list[str]) -> str | None:
    """What is wrong with an arm, or None."""
    allowed = 2 * abs(plain.loss - truth.loss) + FLOOR * truth.loss
    if not abs(arm.loss - truth.loss) <= allowed:
        return f"the loss is {arm.loss:.6g}, the truth {truth.loss:.6g}, allowed to differ by {allowed:.2g}"
    for name, ours, theirs, exact in zip(names, arm.gradients, plain.gradients, truth.gradients, strict=True):
        norm = exact.norm()
        off, budget = ((g.float() - exact).norm() for g in (ours, theirs))
        if not off <= 2 * budget + FLOOR * norm:
            return f"the gradient of {name} is off by {(off / norm).item():.2e} of its norm, plain bf16 by {(budget / norm).item():.2e}"
    return None


def largest_error(arm: Found, truth: Found) -> float:
    """The largest error of a gradient, as a share of its norm."""
    shares = [(g.float() - exact).norm() / exact.norm().clamp(min=1e-30) for g, exact in zip(arm.gradients, truth.gradients, strict=True)]
    return torch.stack(shares).max().item()
