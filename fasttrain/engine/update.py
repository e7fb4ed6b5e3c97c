"""The ways to do one update of AdamW with averages: our one pass over memory, torch's fused AdamW, and other libraries' Adam classes.

All compute the same formula on the same state, named alike, with the step count handed to them: a checkpoint of one is read by any other.
Other libraries' code knows one beta1 for all updates; where it decays, `Work.for_constant_momentum` gives numbers that make up for that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fasttrain_kernels.adamw_ema import adamw_ema, corrections
from fasttrain_kernels.dispatch import here
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """One update of a list of tensors.

    Attributes:
        params, grads, exp_avgs, exp_avg_sqs: one tensor each of every parameter or flat partition; all but grads fp32.
        emas: for each average, such a list; `decays` are the factors of their old values.
        update: of this update, 1 for the first.
        product1: the product of every update's beta1 up to and with this one; None where all had this one's.
        clip: [] fp32, factor of the gradient, or None.
        found_inf: [] fp32: not 0 where nothing may change; or None.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[list[Tensor]]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    update: int
    decays: list[float]
    clip: Tensor | None = None
    found_inf: Tensor | None = None
    product1: float | None = None

    def for_constant_momentum(self) -> tuple[float, float]:
        """The learning rate and weight decay with which code that corrects by 1 - beta1^update does this update.

        lr' = lr (1 - beta1^update) / (1 - product1), and lr' wd' = lr wd: both products that the update computes with stay. The same
        numbers where momentum is constant.
        """
        mine, _ = corrections(self.betas, self.update, self.product1)
        theirs, _ = corrections(self.betas, self.update)
        return (self.lr, self.weight_decay) if mine == theirs else (self.lr * theirs / mine, self.weight_decay * mine / theirs)


class Update(ABC):
    """A way to do it, in place."""

    @abstractmethod
    def __call__(self, work: Work) -> None:
        """Does it; `work.grads` may be changed as well."""

    @abstractmethod
    def describe(self) -> str:
        """What a run says of it at its start."""


@dataclass(frozen=True)
class OnePass(Update):
    """Our kernel: moments, masters and averages in one pass over memory. `impl` is "auto", "triton" or "reference"."""

    impl: str = "auto"

    def __call__(self, work: Work) -> None:
        adamw_ema(
            work.params,
            work.grads,
            work.exp_avgs,
            work.exp_avg_sqs,
            work.emas,
            lr=work.lr,
            betas=work.betas,
            eps=work.eps,
            weight_decay=work.weight_decay,
            update=work.update,
            decays=work.decays,
            product1=work.product1,
            clip=work.clip,
            found_inf=work.found_inf,
            impl=self.impl,
        )

    def describe(self) -> str:
        return f"fasttrain AdamW with averages, {here() if self.impl == 'auto' else self.impl}"


@dataclass(frozen=True)
class TorchFused(Update):
    """torch's fused AdamW; its kernels exist for the CPU too."""

    offloaded: bool = False

    def __call__(self, work: Work) -> None:
        _clip(work)
        steps = [torch.full((), float(work.update), device=work.params[0].device)] * len(work.params)
        lr, weight_decay = work.for_constant_momentum()
        torch._fused_adamw_(
            work.params,
            work.grads,
            work.exp_avgs,
            work.exp_avg_sqs,
            [],
            steps,
            lr=lr,
            beta1=work.betas[0],
            beta2=work.betas[1],
            weight_decay=weight_decay,
            eps=work.eps,
            amsgrad=False,
            maximize=False,
            found_inf=work.found_inf,
        )
        _average(work)

    def describe(self) -> str:
        return f"torch fused AdamW{' (offloaded)' if self.offloaded else ''}, averages in torch"


class Borrowed(Update):
    """Another library's Adam class, given our state and our step count before each of its steps.

    Args:
        make: builds its optimizer for these tensors; other settings are given at every update.
        words: for `describe`.
    """

    def __init__(self, make: Callable[[list[Tensor]], torch.optim.Optimizer], words: str):
        self._make, self._words = make, words
        # One for each list of tensors: such classes may keep lists of their own beside their parameter groups.
        self._made: dict[tuple[int, ...], torch.optim.Optimizer] = {}

    def __call__(self, work: Work) -> None:
        if work.found_inf is not None and bool(work.found_inf):  # these classes cannot skip on the device: a host sync
            return
        _clip(work)
        key = tuple(map(id, work.params))
        if key not in self._made:
            self._made[key] = self._make(work.params)
        optimizer, before = self._made[key], work.update - 1
        lr, weight_decay = work.for_constant_momentum()
        # Apex counts steps by group, DeepSpeed by parameter.
        optimizer.param_groups[0].update(lr=lr, betas=work.betas, eps=work.eps, weight_decay=weight_decay, step=before)
        for p, m, v in zip(work.params, work.exp_avgs, work.exp_avg_sqs, strict=True):
            optimizer.state[p] = {"step": before, "exp_avg": m, "exp_avg_sq": v}
        optimizer.step()
        _average(work)

    def describe(self) -> str:
        return f"{self._words}, averages in torch"


def _clip(work: Work) -> None:
    if work.clip is not None:
        torch._foreach_mul_(work.grads, work.clip)


def _average(work: Work) -> None:
    for emas, decay in zip(work.emas, work.decays, strict=True):
        if work.found_inf is None:
            torch._foreach_lerp_(emas, work.params, 1 - decay)
            continue
        share = torch.where(work.found_inf == 0, 1 - decay, 0.0)
        for ema, p in zip(emas, work.params, strict=True):
            ema.lerp_(p, share)
