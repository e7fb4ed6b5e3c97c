"""AdamW with exponential moving averages as optimizer state, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fasttrain.engine.momentum import Decay, Demon, Momenta, MomentumDecay
from fasttrain.engine.update import OnePass, Update, Work

Implementation = Literal["fasttrain", "torch", "apex", "deepspeed"]
"""Whose code computes the update; the state, and so a checkpoint, is the same."""


class EmaConfig(BaseModel):
    """One moving average of the weights.

    `half_life` counts images; while training is younger than `half_life / ramp` images, the half-life is `ramp` times its age, so that
    the random start is forgotten early (Karras et al. 2024, EDM2 section 3). `ramp: null` switches that off: a decay d at batch B is a
    half-life of B ln 2 / -ln d.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    half_life: float = Field(gt=0)
    ramp: float | None = Field(default=0.05, gt=0)

    def decay(self, position: int, images: int) -> float:
        """The factor of the old average over a step of `images` images that ends at `position`."""
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * position)
        return 0.5 ** (images / half_life)


class OptimizerConfig(BaseModel):
    """AdamW, its learning rate over the run, its momentum, and the averages it keeps. The defaults are the Min-SNR paper's.

    `momentum_decay` lets betas[0] fall over the run and, with `compensate`, the learning rate with it: MDLRC. `decay: demon` is that fall
    of the learning rate alone, momentum constant; its `floor` and `steps` are those of `momentum_decay`, and like it the fall counts from
    the first update, not from the end of the warm-up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(default=1e-4, gt=0, le=1e3)
    betas: tuple[float, float] = (0.99, 0.99)
    eps: float = Field(default=1e-8, ge=1e-30, le=1e3)  # the arithmetic is fp32
    weight_decay: float = Field(default=0.03, ge=0, le=1e3)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Decay = "constant"
    momentum_decay: MomentumDecay | None = None
    ema: tuple[EmaConfig, ...] = (EmaConfig(half_life=1_774_000),)
    implementation: Implementation = "fasttrain"

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        for key, demon in (("decay", self.decay), ("momentum_decay", self.momentum_decay)):
            if isinstance(demon, Demon) and demon.floor > self.betas[0]:
                raise ValueError(f"{key}.floor {demon.floor} lies above betas[0] {self.betas[0]}, from which it falls: lower it")
        if isinstance(self.decay, Demon) and self.momentum_decay is not None and self.momentum_decay.compensate:
            raise ValueError(
                "momentum_decay lowers the learning rate as decay: demon does, and both would do it twice: "
                "set decay to constant, or momentum_decay.compensate to false"
            )
        return self

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate of step 1, 2, ... total_steps: linear warm-up, then constant or a decay.

        With `momentum_decay.compensate` it is compensated besides, by the update's number (`Momenta`), which lags by the skipped steps.
        """
        rate = self.learning_rate * self._decayed(step, total_steps)
        return rate * step / self.warmup_steps if step <= self.warmup_steps else rate

    def _decayed(self, step: int, total_steps: int) -> float:
        if isinstance(self.decay, Demon):
            return self.decay.compensation(self.betas[0], step, total_steps)
        if step <= self.warmup_steps:
            return 1.0
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))), "linear": max(0.0, 1 - done)}[self.decay]

    def build(self, parameters: Iterable[torch.nn.Parameter | dict[str, Any]], update: Update | None = None) -> "AdamWEMA":
        """The optimizer over these parameters; weight decay on every one, as the Min-SNR paper's code does, but where a group has its own.

        `update` is what `updates.choose_update` gives for `implementation`; by default our one pass.

        Raises:
            ValueError: momentum decays over a run whose length nobody said.
        """
        if self.momentum_decay is not None and self.momentum_decay.steps is None:
            raise ValueError("momentum_decay.steps is open: give it, or the run's")
        return AdamWEMA(
            parameters,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            ema=self.ema,
            momentum_decay=self.momentum_decay,
            update=update or OnePass(),
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
        betas: b1 of the first update, and b2.
        ema: the averages to keep; their states are named `ema`, `ema_1`, ...
        momentum_decay: how b1 and the learning rate fall from update to update, with its `steps`; None: b1 stays.
        update: what computes it.

    Attributes:
        learning_rate: of the newest update begun, compensated.
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
        update: Update,
        momentum_decay: MomentumDecay | None = None,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.ema = ema
        self.update = update
        self.learning_rate = lr
        self._beta2 = betas[1]
        self._momenta = Momenta(betas[0], momentum_decay)
        self._momentum = self._momenta.of(1)
        self.max_norm: float | None = None
        self.guard = False
        self.grad_norm: torch.Tensor | None = None
        self._found_inf: torch.Tensor | None = None
        self.clock: Clock | None = None

    def begin(self, clock: Clock, learning_rate: float) -> None:
        """Sets what the next update needs to know; the learning rate is that before compensation."""
        self.clock = clock
        self._momentum = self._momenta.of(clock.update)
        self.learning_rate = learning_rate * self._momentum.compensation
        for group in self.param_groups:
            group.update(lr=self.learning_rate, betas=(self._momentum.beta1, self._beta2))

    def state_names(self) -> list[str]:
        """The keys of every parameter's state, in a fixed order."""
        return ["exp_avg", "exp_avg_sq", *(ema_name(i) for i in range(len(self.ema)))]

    def init_state(self, params: Iterable[torch.Tensor]) -> None:
        """Gives each parameter its state: moments zero, averages equal to the weights."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {name: p.detach().clone() if name.startswith("ema") else torch.zeros_like(p) for name in self.state_names()}

    @property
    def overflow(self) -> bool:
        """Whether the guard kept the last step from being taken: DeepSpeed asks after the step, which is then already on its way."""
        return self._found_inf is not None and bool(self._found_inf)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, as `clock` says; before the first `begin`, nothing.

        Without ZeRO and in bf16, DeepSpeed takes a step with gradients of zero while it is built: weights would decay, and averages
        would start beside them.
        """
        if self.clock is None:
            return
        clip = self._look_at_gradients() if self.guard else None
        decays = [ema.decay(self.clock.position, self.clock.images) for ema in self.ema]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self.init_state(params)
            exp_avgs, exp_avg_sqs, *emas = ([self.state[p][name] for p in params] for name in self.state_names())
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            settings |= {"update": self.clock.update, "product1": self._momentum.product}
            lists = (params, [p.grad for p in params], exp_avgs, exp_avg_sqs, emas)
            self.update(Work(*lists, **settings, decays=decays, clip=clip, found_inf=self._found_inf))

    def _look_at_gradients(self) -> torch.Tensor | None:
        """Measures the norm; returns the factor that clips to `max_norm`. No host sync."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(grads)
        self._found_inf = (~torch.isfinite(self.grad_norm)).float()
        return torch.clamp(self.max_norm / (self.grad_norm + 1e-6), max=1.0) if self.max_norm else None
