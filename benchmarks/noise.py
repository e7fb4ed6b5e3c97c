"""The noise's statistics: how far 10^7 numbers are from what independent normal numbers would give, and Triton's integers from torch's.

    python -m benchmarks.noise [--draws 10000000]        prints the figures beside their limits, writes benchmarks/results/cpu/noise.json

Every deviation is in standard deviations of its own statistic under the hypothesis that the numbers are independent and normal. Seed and
positions are fixed, so a figure within its limit stays there. The integers are compared natively on a GPU and in Triton's interpreter
elsewhere. The exit status is 1 if a limit is exceeded.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from fasttrain_kernels.language import jit, tl
from fasttrain_kernels.philox import Purpose, integers, normal, philox
from fasttrain_kernels.uniform import uniform
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from benchmarks.environment import environment, results_folder
from benchmarks.whole_file import write_json

DRAWS = 10_000_000
PAIRS = 1_000_000
SAMPLE = (4, 32, 32)
SEED = 0x1234_5678_9ABC_DEF0
SIGMAS = 4.0
"""A normal deviate is further out once in 16,000 times."""
KOLMOGOROV = 1.949
"""sqrt(n) D of Kolmogorov and Smirnov is larger once in 1,000 times."""

# Keys and positions of which every word matters, and the first ones.
COUNTERS = ((SEED, 0), (0, 2**32 - 3), (-1, 2**40 + 17), (2**63 - 1, 2**63 - 1))
_EVALUATIONS = 2**13
_CHUNK = 64


class Figure(NamedTuple):
    """One statistic: what was measured, how far that is from what is expected, and how far it may be."""

    name: str
    value: float
    deviation: float  # in standard deviations; of a distribution sqrt(n) D
    limit: float

    @property
    def within(self) -> bool:
        return bool(abs(self.deviation) <= self.limit)


def drawn(draws: int, seed: int = SEED) -> Tensor:
    """At least `draws` of the reference's normals as training draws them: whole latents of successive positions, in float64."""
    size = math.prod(SAMPLE)
    samples = -(-draws // size)
    values = torch.empty(samples, size, dtype=torch.float64)
    for first in range(0, samples, _CHUNK):
        position = torch.arange(first, min(first + _CHUNK, samples))
        values[first : first + _CHUNK] = normal(seed, position, (size,))
    return values.flatten()


def normality(z: Tensor) -> list[Figure]:
    """Moments, tails and distribution of float64 numbers that should be standard normal."""
    n = z.numel()
    mean, variance = z.mean().item(), z.var().item()
    centred = z - mean
    skewness = (centred**3).mean().item() / variance**1.5
    kurtosis = (centred**4).mean().item() / variance**2
    # Variances of the moments of n normal numbers: 1, 2, 6 and 24 over n.
    moments = [("mean", mean, 0.0, 1), ("variance", variance, 1.0, 2), ("skewness", skewness, 0.0, 6), ("kurtosis", kurtosis, 3.0, 24)]
    figures = [Figure(name, value, (value - wanted) / math.sqrt(spread / n), SIGMAS) for name, value, wanted, spread in moments]
    for edge in (4, 5):
        share = 2 * float(stats.norm.sf(edge))
        count = int((z.abs() > edge).sum())
        figures.append(Figure(f"numbers beyond {edge}", count, (count - n * share) / math.sqrt(n * share), SIGMAS))
    return [*figures, kolmogorov("distribution of normals", torch.special.ndtr(z))]


def kolmogorov(name: str, u: Tensor) -> Figure:
    """The largest distance between the distribution of u and the uniform one [Kolmogorov 1933]; the deviation is sqrt(n) D."""
    u, n = u.sort().values, u.numel()
    rank = torch.arange(n, dtype=torch.float64)
    distance = max(((rank + 1) / n - u).max().item(), (u - rank / n).max().item())
    return Figure(name, distance, math.sqrt(n) * distance, KOLMOGOROV)


def uniformity(draws: int) -> list[Figure]:
    """The distribution of the uniform numbers, independent and stratified, over successive positions."""
    position = torch.arange(draws)
    independent, stratified = (uniform(SEED, position, Purpose.TIMESTEP, stratified=flag) for flag in (False, True))
    return [kolmogorov("distribution of independent uniforms", independent), kolmogorov("distribution of stratified uniforms", stratified)]


def independence(pairs: int) -> list[Figure]:
    """Correlations of numbers and of their squares with those of other elements, positions, purposes and seeds."""
    width = 512
    count = -(-pairs // width)

    def draw(seed: int = SEED, first: int = 0, purpose: Purpose = Purpose.NOISE) -> Tensor:
        return normal(seed, first + torch.arange(count), (width,), purpose).double()

    base = draw()
    compared = {f"elements {lag} apart": (base[:, lag:], base[:, :-lag]) for lag in (1, 2, 3, 4, 5, 64)}
    compared |= {f"positions {lag} apart": (base, draw(first=lag)) for lag in (1, 2, 64, 2**32)}
    others = [purpose for purpose in Purpose if purpose != Purpose.NOISE]
    compared |= {f"purposes noise and {purpose.name.lower()}": (base, draw(purpose=purpose)) for purpose in others}
    compared |= {f"seeds that differ in bit {bit}": (base, draw(seed=SEED ^ 1 << bit)) for bit in (0, 1, 32, 62)}
    return [figure for name, (a, b) in compared.items() for figure in _correlations(name, a, b)]


def _correlations(name: str, a: Tensor, b: Tensor) -> Iterator[Figure]:
    root = math.sqrt(a.numel())
    for kind, left, right in (("values", a, b), ("squares", (a**2 - 1) / math.sqrt(2), (b**2 - 1) / math.sqrt(2))):
        correlation = (left * right).mean().item()
        yield Figure(f"{kind}, {name}", correlation, correlation * root, SIGMAS)


@jit
def write_integers(
    seed,  # [] int64
    position,  # [] int64
    out,  # [4, BLOCK] int64
    first,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Philox's four integers for the element indices from `first` on, as kernels draw them."""
    lane = tl.arange(0, BLOCK)
    r0, r1, r2, r3 = integers(tl.load(seed), tl.load(position), first + lane, PURPOSE)
    tl.store(out + lane, r0.to(tl.int64))
    tl.store(out + BLOCK + lane, r1.to(tl.int64))
    tl.store(out + 2 * BLOCK + lane, r2.to(tl.int64))
    tl.store(out + 3 * BLOCK + lane, r3.to(tl.int64))


def integers_of_both(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(Triton's, torch's) integers for several keys, positions and purposes: 131,072 in all, at low and at high element indices."""
    for (seed, place), purpose in zip(COUNTERS, (Purpose.NOISE, Purpose.TIMESTEP, Purpose.POSTERIOR, Purpose.SAMPLE), strict=True):
        key, position = (torch.tensor(value, device=device) for value in (seed, place))
        first = 2**30 if place else 0
        ours = torch.empty((4, _EVALUATIONS), dtype=torch.int64, device=device)
        write_integers[1,](key, position, ours, first, int(purpose), _EVALUATIONS)
        yield ours, torch.stack(philox(key, first + torch.arange(_EVALUATIONS, device=device), purpose, position))


def compare_integers(device: torch.device) -> dict[str, Any]:
    """How many integers were drawn by both and how many differ."""
    pairs = list(integers_of_both(device))
    return {"integers": sum(ours.numel() for ours, _ in pairs), "different": sum(int((a != b).sum()) for a, b in pairs)}


def statistics(draws: int = DRAWS, pairs: int = PAIRS) -> list[Figure]:
    """Every figure."""
    return [*normality(drawn(draws)), *uniformity(pairs), *independence(pairs)]


def main() -> None:
    """Measures, prints the table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _kernels_on(device):
        compared = compare_integers(device)
    figures = statistics(args.draws)
    _print(figures, compared)
    result = {
        "benchmark": "noise",
        "environment": environment(device),
        "settings": {"draws": args.draws, "pairs": PAIRS, "seed": SEED, "reference_on": "cpu"},
        "integers": {**compared, "kernels_run": "natively" if device.type == "cuda" else "in Triton's interpreter"},
        "figures": [{**figure._asdict(), "within": figure.within} for figure in figures],
    }
    write_json(results_folder(device) / "noise.json", result)
    sys.exit(int(compared["different"] > 0 or not all(figure.within for figure in figures)))


def _kernels_on(device: torch.device) -> Any:
    from tests.kernels.interpreter import interpreting

    return nullcontext() if device.type == "cuda" else interpreting()


def _print(figures: Sequence[Figure], compared: dict[str, Any]) -> None:
    table = Table(title="the reference's noise: each deviation in standard deviations (distributions: sqrt(n) D), and its limit")
    for column in ("", "measured", "deviation", "limit"):
        table.add_column(column, justify="left" if column == "" else "right")
    for figure in figures:
        table.add_row(figure.name, f"{figure.value:.6g}", f"{figure.deviation:+.2f}{'' if figure.within else ' !'}", f"{figure.limit:g}")
    console = Console()
    console.print(table)
    console.print(f"{compared['integers']:,} integers drawn by torch and by Triton: {compared['different']} differ")


if __name__ == "__main__":
    main()
