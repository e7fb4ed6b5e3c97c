"""Which attention is fastest for a run's shapes: each candidate timed forward and backward, on the device, once."""

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.models.attention import ATTENTION, PACKAGES, Attend, attention_function, missing, ragged_attention

ROUNDS = 5
REPEATS = 10


class Shape(NamedTuple):
    """What attention works on: [B, h, T, d], as views of one packed qkv matrix; of the first `ragged` of the T some are padding."""

    batch: int
    heads: int
    tokens: int
    head_width: int
    dtype: torch.dtype
    ragged: int = 0

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v as the network has them, wanting gradients."""
        shape = (self.batch, self.tokens, 3, self.heads, self.head_width)
        generator = torch.Generator(device).manual_seed(0)
        qkv = torch.randn(shape, generator=generator, device=device).to(self.dtype).requires_grad_()
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x [B, h, T, d]
        return q, k, v

    def __str__(self) -> str:
        padded = f" (up to {self.ragged} of padding)" if self.ragged else ""
        sizes = f"{self.batch} x {self.heads} heads x {self.tokens} tokens{padded} x {self.head_width}"
        return f"{sizes}, {str(self.dtype).removeprefix('torch.')}"


def candidates() -> list[str]:
    """Every attention that may run here, by name; math, which keeps the whole matrix of scores, only where a GPU has nothing else."""
    return [name for name in ATTENTION if name not in ("auto", "math") and missing(name) is None]


def obstacle(name: str, shape: Shape, device: torch.device, *, deterministic: bool = False, compiled: bool = False) -> str | None:
    """Why `name` cannot run forward and backward at this shape, in its own words; None if it can.

    With `compiled` it must also let itself be captured as one graph, as it will be within a block that is compiled whole.
    """
    if (remedy := missing(name)) is not None:
        return remedy
    if name in PACKAGES and device.type != "cuda":
        return "the flash-attn packages need a GPU"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of each reason before it raises
            attend = _attend(name, shape, device, deterministic)
            _run(torch.compile(attend, fullgraph=True, backend="eager") if compiled else attend, shape.draw(device))
    except Exception as error:  # of whatever type its library raises
        told = (str(error).splitlines() or [""])[0].strip()
        return f"{type(error).__name__}: {told}"
    return None


def timings(names: Iterable[str], shape: Shape, device: torch.device, *, compiled: bool = False) -> dict[str, float]:
    """Seconds of a forward and a backward pass of each attention that runs at this shape: the median of rounds that take turns."""
    able = {name: _attend(name, shape, device) for name in names if obstacle(name, shape, device, compiled=compiled) is None}
    inputs = shape.draw(device)
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(ROUNDS):
        for name, attend in able.items():
            seconds[name].append(_seconds(functools.partial(_run, attend, inputs), device))
    return {name: statistics.median(rounds) for name, rounds in seconds.items()}


def fastest(shape: Shape, device: torch.device, *, compiled: bool = False) -> tuple[str, dict[str, float]]:
    """The fastest attention at this shape and the seconds of each that was tried; on a CPU, and where none runs, torch's own choice.

    A CPU has one fast kernel, which torch takes by itself.
    """
    if device.type != "cuda":
        return "auto", {}
    seconds = timings(candidates(), shape, device, compiled=compiled)
    return (min(seconds, key=seconds.__getitem__) if seconds else "auto"), seconds


def deterministic_choice(shape: Shape, device: torch.device) -> str:
    """An attention whose gradients are the same bits each time, chosen by the dtype and never by time.

    With torch.use_deterministic_algorithms, torch's flash kernel has a deterministic backward pass; it takes bf16 and fp16 only. Math is
    matrix products and a softmax.
    """
    if device.type != "cuda":
        return "auto"
    return "flash" if shape.dtype in (torch.bfloat16, torch.float16) and obstacle("flash", shape, device) is None else "math"


def _attend(name: str, shape: Shape, device: torch.device, deterministic: bool = False) -> Attend:
    """The attention at this shape; where some of the tokens are padding, with captions of every length."""
    if not shape.ragged:
        return attention_function(name, deterministic)
    attend = ragged_attention(name, deterministic)
    length = torch.arange(shape.batch, device=device) * 37 % shape.ragged + 1  # [B]
    return functools.partial(attend, where=attend.where(length, shape.ragged, shape.tokens - shape.ragged))


def _run(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    out = attend(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one call: REPEATS of them in a row, so that what a launch costs hides where the device is busy, as in a step."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    begun.record()
    for _ in range(REPEATS):
        run()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000 / REPEATS
