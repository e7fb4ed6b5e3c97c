"""Gradients of timestep ranges on one network, and how they agree: two independent halves of samples tell signal from noise."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 1 << 20  # that are raised to float64 at once


@dataclass(frozen=True, eq=False)
class RangeGradients:
    """What is known of the gradients g_k of K ranges' mean losses, each estimated twice, from samples of its own.

    Attributes:
        products: [2, K, 2, K] float64: <half h of g_i, half h' of g_j>.
        losses: [2, K] float64, the mean loss of each half.
    """

    products: Tensor
    losses: Tensor

    @property
    def gram(self) -> Tensor:
        """<g_i, g_j> with g the mean of both halves: [K, K]. Noise adds to the diagonal alone, as no two ranges share a sample."""
        return self.products.mean(dim=(0, 2))

    @property
    def cosines(self) -> Tensor:
        """The conflict matrix: the cosine between each two ranges' gradients [K, K]; below 0 they conflict. 0 where one has no gradient.

        Noise draws all but the diagonal towards 0; see `signal_cosines`.
        """
        return _cosines(self.gram, self.gram.diagonal())

    @property
    def signal_cosines(self) -> Tensor:
        """The same with each |g_k|^2 taken between its halves, which noise does not lengthen: [K, K]; NaN where noise hides the signal."""
        between = self._between_halves()
        found = _cosines(self.gram, between.clamp(min=0))
        hidden = between <= 0
        found[hidden[:, None] | hidden[None, :]] = torch.nan
        return found.fill_diagonal_(1.0).masked_fill(torch.diag(hidden), torch.nan)

    @property
    def half_cosines(self) -> Tensor:
        """How well the two halves of each range agree: [K], 1 without noise."""
        first, second = (self.products[h, :, h, :].diagonal() for h in range(2))
        scale = (first * second).sqrt()
        return torch.where(scale > 0, self._between_halves() / scale, 0.0)

    @property
    def noise_shares(self) -> Tensor:
        """The share of |g_k|^2 that is noise: [K], 1 - (between halves) / (of their mean)."""
        square = self.gram.diagonal()
        return torch.where(square > 0, 1 - self._between_halves() / square, 0.0)

    def _between_halves(self) -> Tensor:
        return self.products[0, :, 1, :].diagonal()


def range_gradients(
    parameters: Sequence[Tensor],
    losses: Callable[[int, int], Iterator[Tensor]],
    ranges: int,
    *,
    room: int = 4 << 30,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> RangeGradients:
    """Estimates the gradients' products without keeping more of them than there is room for.

    All 2 K gradients are kept of a block of parameters at a time; each further block costs another pass over the samples.

    Args:
        parameters: of the network; those without a gradient count as 0.
        losses: (range, half) -> the losses [] of its micro-batches of equal size, the same at each call.
        ranges: K.
        room: bytes for gradients, on the parameters' device.
        total: sums a tensor over all ranks; each has micro-batches of its own, as many as the others.
    """
    products = torch.zeros(2 * ranges, 2 * ranges, dtype=torch.float64)
    mean_losses = torch.zeros(2, ranges, dtype=torch.float64)
    for block in blocks(parameters, room // (2 * ranges * 4)):
        rows = torch.zeros(2 * ranges, sum(p.numel() for p in block), device=block[0].device)
        for half in range(2):
            for number in range(ranges):
                row = half * ranges + number
                mean_losses[half, number] = _accumulate(rows[row], block, losses(number, half), total)
        products += _products(rows)
    return RangeGradients(products.view(2, ranges, 2, ranges), mean_losses)


def blocks(parameters: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """The parameters in order, in blocks of at most `most` numbers; a larger one stands alone."""
    made: list[list[Tensor]] = []
    filled = 0
    for parameter in parameters:
        if not made or filled + parameter.numel() > most:
            made.append([])
            filled = 0
        made[-1].append(parameter)
        filled += parameter.numel()
    return made


def _accumulate(row: Tensor, block: list[Tensor], losses: Iterator[Tensor], total: Callable[[Tensor], Tensor]) -> float:
    """Fills a row with the mean gradient of these losses with respect to the block; returns their mean."""
    seen = torch.zeros(2, dtype=torch.float64, device=row.device)
    for loss in losses:
        found = torch.autograd.grad(loss, block, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(block, found, strict=True)]
        row += torch.cat([g.reshape(-1).float() for g in flat])
        seen += torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])
    summed, count = total(seen).tolist()
    total(row).div_(count)
    return summed / count


def _products(rows: Tensor) -> Tensor:
    """rows rows^T in float64, on the host."""
    found = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in rows.split(COLUMNS, dim=1):
        wide = columns.double()
        found += wide @ wide.T
    return found.cpu()


def _cosines(gram: Tensor, squares: Tensor) -> Tensor:
    lengths = squares.sqrt()
    scale = lengths[:, None] * lengths[None, :]
    return torch.where(scale > 0, gram / scale, 0.0)
