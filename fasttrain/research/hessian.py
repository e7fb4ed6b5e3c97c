"""Products of a loss's Hessian with vectors, by differentiating twice: no more memory than a few gradients."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class Hessian:
    """v [P] -> H v [P] of the mean of losses:  H v = d (g . v) / d theta,  g = d loss / d theta               [Pearlmutter 1994].

    What the loss does not depend on has rows of zeros.

    Args:
        parameters: theta, in order; P numbers in all, of one dtype.
        losses: -> the losses [] of micro-batches of equal size, the same at each call; each must be differentiable twice.
        total: sums a tensor over all ranks; each has micro-batches of its own, as many as the others.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        losses: Callable[[], Iterator[Tensor]],
        total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        self._parameters, self._losses, self._total = list(parameters), losses, total
        self.size = sum(parameter.numel() for parameter in self._parameters)

    def __call__(self, vector: Tensor) -> Tensor:
        """H v in v's dtype; micro-batches are added up in it too."""
        along = [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in self._parameters]), self._parameters, strict=True)]
        found, count = torch.zeros_like(vector), torch.zeros(1, dtype=torch.float64, device=vector.device)
        for loss in self._losses():
            found += self._flat(self._once(loss, along), vector)
            count += 1
        return self._total(found).div_(float(self._total(count)))

    def _once(self, loss: Tensor, along: list[Tensor]) -> Sequence[Tensor | None]:
        gradients = torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True)
        slope = [(g * v).sum() for g, v in zip(gradients, along, strict=True) if g is not None and g.requires_grad]
        if not slope:
            return [None] * len(along)  # a loss that is linear in everything
        return torch.autograd.grad(torch.stack(slope).sum(), self._parameters, allow_unused=True)

    def _flat(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        whole = [torch.zeros_like(p) if part is None else part for part, p in zip(parts, self._parameters, strict=True)]
        return torch.cat([part.reshape(-1) for part in whole]).to(like.dtype)


def random_signs(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """+1 or -1 each with probability 1/2, [P]: drawn on the host, so that every device and rank has the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1).to(device, dtype)
