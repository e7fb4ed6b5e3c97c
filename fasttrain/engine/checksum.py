"""A checksum of what every rank must hold alike, and who holds it otherwise.

    c = sum_t a_t sum_j b_j sum_i m_i w_tji    mod 2^64,    m_i, b_j, a_t odd

w_tji: word i of chunk j of tensor t, its elements' bits as integers. An odd factor can be divided by modulo 2^64, so a change within one
word, of one bit or of all, always changes c; the factors differ from place to place, so swapped words, chunks or tensors change it too.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from fasttrain.engine.distributed import Processes

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The checksum of each tensor's bits: int64 [tensors], where they lie. Needs about 24 MiB beside them, and no host sync."""
    factors = _odd(min(max(tensor.numel() for tensor in tensors), _CHUNK), 0, tensors[0].device)
    return torch.stack([_checksum(tensor.detach(), factors) for tensor in tensors])


def _checksum(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    words = tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
    return _weighted(torch.stack([(chunk.long() * factors[: len(chunk)]).sum() for chunk in words.split(_CHUNK)]), 1)


def total(parts: torch.Tensor) -> torch.Tensor:
    """One checksum [] of those of several tensors [n]."""
    return _weighted(parts, 2)


def _weighted(parts: torch.Tensor, level: int) -> torch.Tensor:
    return (parts * _odd(len(parts), level, parts.device)).sum()


def _odd(count: int, level: int, device: torch.device) -> torch.Tensor:
    """Odd numbers that no pattern relates, others at each level: the mixing of SplitMix64 (Steele et al. 2014), in wrapping int64."""
    first = 1 + (level << 40)
    mixed = torch.arange(first, first + count, device=device) * -7046029254386353131
    mixed = (mixed ^ _shifted(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shifted(mixed, 27)) * -7723592293110705685
    return mixed ^ _shifted(mixed, 31) | 1


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def differing(processes: Processes, named: Iterator[tuple[str, torch.Tensor]]) -> str | None:
    """Which ranks do not hold these tensors as the others do, the same text on all; None where all do. A collective and a host sync."""
    names, tensors = zip(*named, strict=True)
    sums = checksums(tensors)
    totals = processes.gather(int(total(sums)))
    if len(set(totals)) == 1:
        return None
    each = processes.gather(sums.tolist())
    odd_ones = next(name for name, *held in zip(names, *each, strict=True) if len(set(held)) > 1)
    return f"{_who(totals)}; the first that differs is {odd_ones}"


def _who(totals: list[int]) -> str:
    """Which ranks hold something else than most."""
    (most, count), *_ = Counter(totals).most_common()
    if 2 * count <= len(totals):
        groups = [[rank for rank, value in enumerate(totals) if value == one] for one in dict.fromkeys(totals)]
        told = " and ".join(_ranks(group) for group in groups)
        return f"{told} hold different weights, and which are right cannot be told from so few"
    return f"{_ranks([rank for rank, value in enumerate(totals) if value != most])} of {len(totals)} holds other weights than the rest"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
