"""EDM2's learned uncertainty: how large the loss is at each noise level, learned beside the network and divided out of it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.diffusion.schedule import Schedule

FREQUENCIES = 32
# ln(sigma / alpha) that the features tell apart: all that the schedules here have but the last steps before pure noise.
FURTHEST = 10.0
_NAME = "uncertainty"


class Uncertainty(nn.Module):
    """u(t) of the loss  L = w |error|^2 / e^u + u,  a learned function of the noise level alone [Karras et al. 2024, EDM2].

    dL / du = 0 where e^u = w E|error|^2: u learns the log of the loss, and each noise level then adds 1 to L, and a gradient as large as
    every other's. So what the weighting says of the levels' order is divided out as u learns it; what counts on is how often each is drawn.

    u = sum_k c_k cos(pi k p),  p = (ln(sigma / alpha) + 10) / 20 in [0, 1],  k = 0 .. 31;  c = 0 at the start, where L is the plain loss.
    EDM2 has random frequencies and phases in their place. No weight decay acts on c (`decay_groups`), as none does in EDM2: it would pull
    u towards 0, away from the loss.

    Args:
        schedule: of the run, which says what noise a timestep has.
    """

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.weight = nn.Parameter(torch.zeros(FREQUENCIES))

    def forward(self, t: Tensor) -> Tensor:
        """u [B] fp32 of timesteps t [B]."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        place = ((sigma / alpha).log().clamp(-FURTHEST, FURTHEST) / (2 * FURTHEST) + 0.5).float()
        features = torch.cos(place[:, None] * (math.pi * torch.arange(FREQUENCIES, device=t.device)))
        return (features * self.weight.float()).sum(dim=1)


def add_uncertainty(network: nn.Module, schedule: Schedule) -> None:
    """Gives a network an uncertainty, its child of that name: in training mode its call returns (prediction, u [B]).

    A hook of the network's own call: it runs within the engine's, so that ZeRO 3 gathers the weights of both alike.
    """
    network.add_module(_NAME, Uncertainty(schedule))
    network.register_forward_hook(_beside)


def decay_groups(network: nn.Module) -> list[dict[str, Any]]:
    """What is trained, as an optimizer's parameter groups: the network's weights, and its uncertainty's, which do not decay."""
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    own = [trained.pop(name) for name in [*trained] if name.startswith(f"{_NAME}.")]
    return [{"params": [*trained.values()]}, *([{"params": own, "weight_decay": 0.0}] if own else [])]


def _beside(network: nn.Module, args: tuple[Any, ...], prediction: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return (prediction, network.get_submodule(_NAME)(args[1])) if network.training else prediction
