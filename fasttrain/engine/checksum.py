"""A checksum of what every rank must hold alike, and who holds it otherwise.

    c = sum_t a_t sum_i m_i w_i    mod 2^64,    m_i, a_t odd

w_i: the words of tensor t, its elements' bits as integers. An odd factor can be divided by modulo 2^64, so a change within one word, of
one bit or of all, always changes c; m_i and a_t differ from place to place, so swapped words or tensors change it too.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from fasttrain.engine.distributed import Processes

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The checksum of each tensor's bits: int64 [tensors], where they lie. Needs about 24 MiB beside them, and no host sync."""
    factors = _odd(min(max(tensor.numel() for tensor in tensors), _CHUNK), tensors[0].device)
    return torch.stack([_checksum(tensor.detach(), factors) for tensor in tensors])


def _checksum(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    words = tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
    return total(torch.stack([(chunk.long() * factors[: len(chunk)]).sum() for chunk in words.split(_CHUNK)]))


def total(parts: torch.Tensor) -> torch.Tensor:
    """One checksum [] of several [n], sensitive to their order."""
    return (parts * _odd(len(parts), parts.device)).sum()


def _odd(count: int, device: torch.device) -> torch.Tensor:
    """Odd numbers that no pattern relates: the mixing of SplitMix64 (Steele et al. 2014), in wrapping int64."""
    mixed = torch.arange(1, count + 1, device=device) * -7046029254386353131
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
