"""AdamW with exponential moving averages as optimizer state, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator


class EmaConfig(BaseModel):
    """One moving average of the weights.

    `half_life` counts images; while training is younger than `half_life / ramp` images, the half-life is `ramp` times its age, so that
    the random start is forgotten early (Karras et al. 2024, EDM2 section 3). `ramp: null` switches that off: a decay d at batch B is a
    half-life of B ln 2 / -ln d.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    half_life: float = Field(gt=0)
    ramp: float | None = Field(default=0.05, gt=0)

    def decay(self, position: int, images: int) -> float:
        """The factor of the old average over a step of `images` images that ends at `position`."""
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * position)
        return 0.5 ** (images / half_life)


class OptimizerConfig(BaseModel):
    """AdamW, its learning rate over the run, and the averages it keeps. The defaults are the Min-SNR paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.99, 0.99)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.03, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["constant", "cosine", "linear"] = "constant"
    ema: tuple[EmaConfig, ...] = (EmaConfig(half_life=1_774_000),)

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate of step 1, 2, ... total_steps: linear warm-up, then constant or a decay to zero."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        factor = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))), "linear": max(0.0, 1 - done)}[self.decay]
        return self.learning_rate * factor

    def build(self, parameters: Iterable[torch.nn.Parameter], max_norm: float | None = None) -> "AdamWEMA":
        """The optimizer over these parameters; weight decay on every one, as the Min-SNR paper's code does."""
        return AdamWEMA(
            parameters,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            ema=self.ema,
            max_norm=max_norm,
        )


@dataclass(frozen=True)
class Clock:
    """What the trainer knows of the update that comes next.

    DeepSpeed calls the optimizer once per partition and advances its own counters on skipped steps, so the count comes from here.
    """

    update: int
    position: int
    images: int


def ema_name(index: int) -> str:
    """The optimizer-state key of the average number `index`: `ema`, `ema_1`, ..."""
    return "ema" if index == 0 else f"ema_{index}"


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) and exponential moving averages of the weights, updated together.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps);  ema = d ema + (1 - d) p

    All state is fp32 and lives beside the master weights, so ZeRO shards the averages as it shards the moments. Call `begin` before
    every step.

    Args:
        ema: the averages to keep; their states are named `ema`, `ema_1`, ...
        guard: without ZeRO and in fp32 nothing above this class looks at the gradients: then measure their norm here, clip to
            `max_norm`, and skip the step when it is not finite. ZeRO's own optimizers do the same before they call this one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ema: tuple[EmaConfig, ...],
        max_norm: float | None = None,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.ema = ema
        self.max_norm = max_norm
        self.guard = False
        self.overflow = False
        self.grad_norm: torch.Tensor | None = None
        self.clock = Clock(update=1, position=1, images=1)

    def begin(self, clock: Clock, learning_rate: float) -> None:
        """Sets what the next update needs to know."""
        self.clock = clock
        for group in self.param_groups:
            group["lr"] = learning_rate

    def state_names(self) -> list[str]:
        """The keys of every parameter's state, in a fixed order."""
        return ["exp_avg", "exp_avg_sq", *(ema_name(i) for i in range(len(self.ema)))]

    def init_state(self, params: Iterable[torch.Tensor]) -> None:
        """Gives each parameter its state: moments zero, averages equal to the weights."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {name: p.detach().clone() if name.startswith("ema") else torch.zeros_like(p) for name in self.state_names()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, as `clock` says."""
        if self.guard and not self._gradients_fine():
            return
        decays = [ema.decay(self.clock.position, self.clock.images) for ema in self.ema]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.init_state([p])
                    self._update(p, p.grad, self.state[p], group, decays)

    def _update(
        self, p: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any], decays: list[float]
    ) -> None:
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1**self.clock.update, 1 - beta2**self.clock.update
        exp_avg = state["exp_avg"].lerp_(grad, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(exp_avg, denominator, value=-group["lr"] / correction1)
        for i, decay in enumerate(decays):
            state[ema_name(i)].lerp_(p, 1 - decay)

    def _gradients_fine(self) -> bool:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(grads)
        self.overflow = not bool(torch.isfinite(self.grad_norm))
        if self.max_norm and not self.overflow:
            torch._foreach_mul_(grads, torch.clamp(self.max_norm / (self.grad_norm + 1e-6), max=1.0))
        return not self.overflow
