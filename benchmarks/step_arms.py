"""The arms of the step benchmark, each a whole training step: loss, backward, optimizer and average."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fasttrain_kernels.dispatch import Kernels
from torch import Tensor

from benchmarks import updates
from benchmarks.capture import captured
from benchmarks.networks import REFERENCE, as_public_code, batch_of, build_network, our_objective, plain_objective
from benchmarks.updates import TrainingState, Update
from fasttrain.cond import Cond
from fasttrain.models import Transformer

OURS = Kernels("auto")


@dataclass(frozen=True)
class Spec:
    """What an arm is.

    Args:
        kernels: implementation of the operations within the network, and of the objective where it is ours.
        plain: the objective as public training loops write it, instead of ours.
        autocast: fp32 weights under autocast, instead of bf16 weights and fp32 masters.
        compiled: torch.compile of each block.
        graphed: forward and backward replayed as one CUDA graph.
        packed: how attention passes over the padding of captions, see Implementations; None: as the attention chosen can.
    """

    name: str
    means: str
    update: Update
    kernels: Kernels = REFERENCE
    plain: bool = True
    autocast: bool = False
    compiled: bool = False
    graphed: bool = False
    packed: bool | None = None


OUR_UPDATE = updates.ours("auto")
ARMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("eager", "fp32 weights under autocast, torch's default AdamW, a loop for the average", updates.eager, autocast=True),
        Spec("tuned eager", "bf16 weights, norms in fp32, torch's fused AdamW, foreach average", updates.fused),
        Spec("compile", "tuned eager, each block compiled", updates.fused, compiled=True),
        Spec("compile + graphs", "compile, replayed as a CUDA graph", updates.fused, compiled=True, graphed=True),
        Spec("ours, kernels only", "our kernels, eager", OUR_UPDATE, OURS, plain=False),
        Spec("ours, compiled", "our kernels, each block compiled", OUR_UPDATE, OURS, plain=False, compiled=True),
        Spec("ours", "ours, compiled, replayed as a CUDA graph", OUR_UPDATE, OURS, plain=False, compiled=True, graphed=True),
        Spec("ours, masked", "our kernels, eager; captions' padding masked in attention", OUR_UPDATE, OURS, plain=False, packed=False),
        Spec(
            "ours, packed", "our kernels, eager; captions packed by their bounds in attention", OUR_UPDATE, OURS, plain=False, packed=True
        ),
    )
}


class StepArm:
    """One arm with its network, ready to train on a fixed batch.

    Raises:
        ValueError: a CUDA graph was asked for on a CPU.
    """

    def __init__(
        self, spec: Spec, config: Transformer, state: TrainingState, batch: int, device: torch.device, *, backend: str, attention: str
    ):
        if spec.graphed and device.type != "cuda":
            raise ValueError("CUDA graphs need a CUDA device")
        self.spec, self.state, self.device = spec, state, device
        # The fastest attention may be one that takes no mask.
        attention = "auto" if spec.packed is False else attention
        self.network = build_network(config, spec.kernels, attention, device, spec.packed)
        state.share_with(self.network, spec.autocast)
        if spec.compiled:
            self.network.compile(backend=backend, dynamic=False)
        elif spec.plain:
            as_public_code(self.network)
        objective = plain_objective(config, device) if spec.plain else our_objective(config, spec.kernels, device)
        self._loss: Callable[..., Tensor] = objective
        self._batch = batch_of(config, batch, device)
        self._parameters = state.parameters(spec.autocast)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._grads: list[Tensor] = []

    def model(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network, under autocast if that is the arm's way."""
        if not self.spec.autocast:
            return self.network(x_t, t, cond)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return self.network(x_t, t, cond)

    @torch.no_grad()
    def loss(self) -> Tensor:
        """The loss of the next batch, whose turn it stays."""
        x0, cond, position = self._batch
        return self._loss(self.model, x0, cond, position + x0.shape[0])

    def begin(self) -> None:
        """Takes its turn: captures the graph, if it has one, in memory that is given back at the end of the turn."""
        if self.spec.graphed:
            self._graph, self._grads = captured(self._gradients, self.device)

    def step(self) -> None:
        """One training step."""
        if self._graph is None:
            self._grads = []  # their memory is the next ones'
            self._grads = self._gradients()
        else:
            self._graph.replay()
        self.spec.update(self.state, self._grads)

    def end(self) -> None:
        """Ends its turn and gives its memory back."""
        self._grads = []
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
        free_memory(self.device)

    def _gradients(self) -> list[Tensor]:
        """Loss and backward pass of the next batch. No parameter keeps its gradient: a graph's memory must go when its arm ends."""
        self._forget_gradients()
        x0, cond, position = self._batch
        position.add_(x0.shape[0])
        self._loss(self.model, x0, cond, position).backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        self._forget_gradients()
        return gradients

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def free_memory(device: torch.device) -> None:
    """Gives memory that nothing uses back to the device, where a graph's own pool can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed_steps(step: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` steps one after another, with no wait between them."""
    if device.type != "cuda":
        taken = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            taken.append(time.perf_counter() - begin)
        return taken
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]
