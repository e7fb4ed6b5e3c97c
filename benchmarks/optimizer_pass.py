"""AdamW with an average in one pass, against torch's fused AdamW and a foreach average: over one flat tensor and over a list of tensors.

The state is that of mixed precision: gradients and weights bf16; masters, moments and one average fp32. The baseline does what has to be
done without our kernel: gradients to fp32, torch's fused AdamW on the masters, the average by foreach operations, masters to bf16.
Bytes are the one-pass minimum of 36 a parameter for every arm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fasttrain_kernels.adamw_ema import adamw_ema
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks.stage import Stage
from benchmarks.timing import Clock, flat, host_seconds, interleaved, ratio, spread
from tests.kernels.calls import budget, errors

OPERATIONS = ("adamw_ema",)
MINIMUM = 36
LR, BETAS, EPS, WEIGHT_DECAY, DECAY, UPDATE = 1e-4, (0.9, 0.99), 1e-8, 0.03, 0.999, 10


@dataclass
class Buffers:
    """What an update reads and writes, one tensor of each kind for every parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor]
    weights: list[Tensor]
    wide_grads: list[Tensor]
    steps: list[Tensor]

    @classmethod
    def drawn(cls, sizes: list[int], device: torch.device, dtype: torch.dtype = torch.float32) -> "Buffers":
        """The same random state for the same sizes."""
        generator = torch.Generator(device).manual_seed(1)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(size, generator=generator, device=device).mul_(scale) for size in sizes]

        params, grads = draw(0.02), [g.bfloat16() for g in draw(1e-3)]
        moments, squares = draw(1e-3), [s.square_() for s in draw(1e-3)]
        wide = [[t.to(dtype) for t in kind] for kind in (params, moments, squares)]
        steps = [torch.full((), UPDATE - 1.0, device=device) for _ in sizes]
        return cls(
            wide[0],
            grads,
            wide[1],
            wide[2],
            [p.clone() for p in wide[0]],
            [p.bfloat16() for p in params],
            [g.to(dtype) for g in grads],
            steps,
        )

    def states(self) -> list[Tensor]:
        """What an update changes in fp32."""
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.emas]


Update = Callable[[Buffers], Any]


def ours(b: Buffers) -> None:
    """The one pass."""
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY, "update": UPDATE, "decays": [DECAY]}
    adamw_ema(b.params, b.grads, b.exp_avgs, b.exp_avg_sqs, [b.emas], weights=b.weights, **settings)


def plain(b: Buffers) -> None:
    """The formula, an operation at a time; torch.compile fuses it."""
    for p, g, m, v, ema, weight in zip(b.params, b.grads, b.exp_avgs, b.exp_avg_sqs, b.emas, b.weights, strict=True):
        wide = g.to(p.dtype)
        m.lerp_(wide, 1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(wide, wide, value=1 - BETAS[1])
        denominator = v.sqrt().div_((1 - BETAS[1] ** UPDATE) ** 0.5).add_(EPS)
        p.mul_(1 - LR * WEIGHT_DECAY).addcdiv_(m, denominator, value=-LR / (1 - BETAS[0] ** UPDATE))
        ema.lerp_(p, 1 - DECAY)
        weight.copy_(p)


def fused(b: Buffers) -> None:
    """torch's fused AdamW on the masters, everything else by foreach operations."""
    torch._foreach_copy_(b.wide_grads, b.grads)
    settings: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY, "eps": EPS, "beta1": BETAS[0], "beta2": BETAS[1]}
    adamw(b.params, b.wide_grads, b.exp_avgs, b.exp_avg_sqs, [], b.steps, fused=True, amsgrad=False, maximize=False, **settings)
    torch._foreach_lerp_(b.emas, b.params, 1 - DECAY)
    torch._foreach_copy_(b.weights, b.params)


def sizes(form: str, smoke: bool) -> list[int]:
    """Elements of each tensor: four DiT blocks of width 1152, flat or tensor by tensor."""
    width, blocks = (8, 2) if smoke else (1152, 4)
    matrices = (6 * width, 3 * width, width, 4 * width, 4 * width)
    shapes = [size for _ in range(blocks) for rows in matrices for size in (rows * width, rows)]
    return [sum(shapes)] if form == "flat" else shapes


def run(stage: Stage, clock: Clock, ceilings: dict[str, Any], rounds: int, repeats: int, smoke: bool) -> None:
    """One case for each form."""
    for form in ("flat", "list"):
        elements = sizes(form, smoke)

        def measured(form: str = form, elements: list[int] = elements) -> dict[str, Any]:
            return measure(_updates(form, smoke), elements, clock, ceilings, rounds, repeats)

        stage.case(measured, operation="adamw_ema", options=form, sample=[sum(elements)], batch=1)


def _updates(form: str, smoke: bool) -> dict[str, Update]:
    updates: dict[str, Update] = {"eager": plain, "fused + foreach": fused, "ours": ours}
    if form == "flat" and not smoke:
        updates["compile"] = torch.compile(plain, fullgraph=True, dynamic=False)
    return updates


def measure(
    updates: dict[str, Update], elements: list[int], clock: Clock, ceilings: dict[str, Any], rounds: int, repeats: int
) -> dict[str, Any]:
    """Every arm's time, after its new state was compared with the formula's in float64."""
    refused = {name: wrong for name, update in updates.items() if (wrong := fault(update, elements, clock.device))}
    able = {name: update for name, update in updates.items() if name not in refused}
    buffers = {name: Buffers.drawn(elements, clock.device) for name in able}
    calls = {name: (lambda update=update, mine=buffers[name]: update(mine)) for name, update in able.items()}
    series = interleaved(clock, {name: (call, None) for name, call in calls.items()}, rounds, repeats)
    moved = MINIMUM * sum(elements)
    figures: dict[str, Any] = {"arms": {}, "refused": refused}
    for name, taken in series.items():
        seconds = spread(flat(taken))
        rate = moved / seconds["median"]
        shares = {
            "of_copy": rate / ceilings["bytes_per_second"],
            "of_datasheet": rate / ceilings["datasheet"] if ceilings["datasheet"] else None,
        }
        figures["arms"][name] = {"update": {"seconds": seconds, "bytes": moved, "bytes_per_second": rate, **shares}}
        figures["arms"][name]["host_seconds"] = host_seconds(calls[name], clock.device)
    for name in ("fused + foreach", "compile"):
        if {name, "ours"} <= series.keys():
            figures[f"update_{name}_over_ours".replace(" + ", "_")] = ratio(series[name], series["ours"])
    return figures


def fault(update: Update, elements: list[int], device: torch.device) -> str | None:
    """What is wrong with an update's new state, or None: off by more than twice the error of the formula in fp32."""
    truth, reference, mine = (
        Buffers.drawn(elements, device, torch.float64),
        Buffers.drawn(elements, device),
        Buffers.drawn(elements, device),
    )
    for which, buffers in ((plain, truth), (plain, reference), (update, mine)):
        which(buffers)
    for ours_, theirs, exact in zip(mine.states(), reference.states(), truth.states(), strict=True):
        found, allowed = errors(ours_, exact), budget(theirs, exact, drawn=False)
        if any(f > a for f, a in zip(found, allowed, strict=True)):
            return f"the new state is off by {found.largest:.3g}, allowed {allowed.largest:.3g}"
    return None
