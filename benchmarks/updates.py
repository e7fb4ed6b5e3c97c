"""The training state that all arms of a model share, and the ways to update it: ours in one pass, and torch's with an average.

One set of fp32 masters, moments and averages serves every arm, or six arms of a large model would not fit beside one another; what is
trained in turn by several arms trains on, and only its speed is looked at. Weights are bf16, as are their gradients; the autocast arm
computes on the masters themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fasttrain_kernels.adamw_ema import adamw_ema
from torch import Tensor, nn
from torch.optim.adamw import adamw

LR, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.99), 1e-8, 0.03
DECAY = 0.999


@dataclass
class TrainingState:
    """Masters and what belongs to them, one tensor for each trained parameter, and everything in a network by its name.

    Attributes:
        masters, exp_avgs, exp_avg_sqs, emas: fp32.
        weights: the bf16 parameters that networks compute with.
        wide: the same as parameters in fp32, sharing the masters' memory.
        steps, host_steps: what torch's fused AdamW counts with on the device, and its default one on the host.
    """

    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor]
    steps: list[Tensor]
    host_steps: list[Tensor]
    weights: dict[str, nn.Parameter]
    wide: dict[str, nn.Parameter]
    trained: list[str]
    update: int = 0

    @classmethod
    def of(cls, network: nn.Module) -> "TrainingState":
        """The state of a network in fp32, whose weights are rounded to bf16 first: so every arm begins with the very same ones."""
        wide = dict(network.named_parameters())
        for parameter in wide.values():
            parameter.data.copy_(parameter.data.bfloat16())
        trained = [name for name, parameter in wide.items() if parameter.requires_grad]
        weights = {name: nn.Parameter(p.detach().bfloat16(), requires_grad=p.requires_grad) for name, p in wide.items()}
        masters = [wide[name].detach() for name in trained]
        moments = [[torch.zeros_like(m) for m in masters] for _ in range(2)]
        steps, host_steps = ([torch.zeros((), device=device) for _ in masters] for device in (masters[0].device, "cpu"))
        return cls(masters, *moments, [m.clone() for m in masters], steps, host_steps, weights, wide, trained)

    def share_with(self, network: nn.Module, autocast: bool) -> None:
        """Makes a network compute with these parameters."""
        network.load_state_dict(self.wide if autocast else self.weights, strict=True, assign=True)

    def parameters(self, autocast: bool) -> list[nn.Parameter]:
        """The trained parameters of such a network."""
        return [(self.wide if autocast else self.weights)[name] for name in self.trained]

    @torch.no_grad()
    def settle(self) -> None:
        """Makes the masters what the bf16 weights are, so that networks in fp32 and in bf16 are the same ones again."""
        torch._foreach_copy_(self.masters, [self.weights[name] for name in self.trained])

    def parameter_count(self) -> int:
        """Elements trained."""
        return sum(m.numel() for m in self.masters)


Update = Callable[[TrainingState, list[Tensor]], None]


def ours(impl: str) -> Update:
    """AdamW, the average and the bf16 weights in one pass over memory."""

    def update(state: TrainingState, grads: list[Tensor]) -> None:
        state.update += 1
        settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY, "update": state.update, "decays": [DECAY]}
        weights = [state.weights[name].detach() for name in state.trained]
        adamw_ema(state.masters, grads, state.exp_avgs, state.exp_avg_sqs, [state.emas], weights=weights, impl=impl, **settings)

    return update


@torch.no_grad()
def fused(state: TrainingState, grads: list[Tensor]) -> None:
    """torch's fused AdamW on the masters; gradients to fp32, average, and weights to bf16 by foreach operations."""
    wide = [torch.empty_like(m) for m in state.masters]
    torch._foreach_copy_(wide, grads)
    _torch_adamw(state, wide, fused=True)
    torch._foreach_lerp_(state.emas, state.masters, 1 - DECAY)
    torch._foreach_copy_([state.weights[name] for name in state.trained], state.masters)


@torch.no_grad()
def eager(state: TrainingState, grads: list[Tensor]) -> None:
    """torch's default AdamW on fp32 parameters and gradients, and a loop over the average, as public training scripts have it."""
    _torch_adamw(state, grads, fused=False)
    for ema, master in zip(state.emas, state.masters, strict=True):
        ema.mul_(DECAY).add_(master, alpha=1 - DECAY)


def _torch_adamw(state: TrainingState, grads: list[Tensor], fused: bool) -> None:
    adamw(
        state.masters,
        grads,
        state.exp_avgs,
        state.exp_avg_sqs,
        [],
        state.steps if fused else state.host_steps,
        fused=fused,
        foreach=not fused,
        amsgrad=False,
        maximize=False,
        lr=LR,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        eps=EPS,
    )
