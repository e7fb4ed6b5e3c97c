"""The randomness in kernels: the same integers as plain torch, and normals within the stated error of them."""

import math

import pytest
import torch
from fasttrain_kernels.language import jit, tl
from fasttrain_kernels.philox import Purpose, _box_muller, _box_muller_kernel, normal, normals, philox

from benchmarks.noise import compare_integers, write_integers

POSITIONS = (0, 1, 2**32 - 1, 2**32, 2**40 + 17, 2**63 - 1, -1)
SEEDS = (0, 1, -1, 2**32, 0x1234_5678_9ABC_DEF0, -(2**63))


@jit
def _write_normals(seed, position, out, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    values = normals(tl.load(seed), tl.load(position), block * BLOCK, PURPOSE, BLOCK)
    tl.store(out + block * BLOCK + tl.arange(0, BLOCK), values)


@jit
def _write_box_muller(first, second, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    z0, z1 = _box_muller_kernel(tl.load(first + lane).to(tl.uint32), tl.load(second + lane).to(tl.uint32))
    tl.store(out + lane, z0)
    tl.store(out + BLOCK + lane, z1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_integers_as_plain_torch(seed: int, device: torch.device) -> None:
    key = torch.tensor(seed, device=device)
    for place in POSITIONS:
        position = torch.tensor([place], device=device)
        out = torch.empty((4, 64), dtype=torch.int64, device=device)
        first = 2**30  # a high element index
        write_integers[1,](key, position, out, first, int(Purpose.SAMPLE), 64)
        expected = philox(key, first + torch.arange(64, device=device), Purpose.SAMPLE, position)
        assert torch.equal(out, torch.stack(expected))


@pytest.mark.usefixtures("kernels")
def test_a_hundred_thousand_integers_are_the_same(device: torch.device) -> None:
    compared = compare_integers(device)
    assert compared["integers"] > 100_000 and compared["different"] == 0


@pytest.mark.usefixtures("kernels")
def test_normals_are_within_the_stated_error(device: torch.device) -> None:
    key, position = torch.tensor(11, device=device), torch.tensor([2**33 + 5], device=device)
    out = torch.empty(2**16, device=device)
    _write_normals[8,](key, position, out, int(Purpose.NOISE), 2**13)
    exact = normal(key, position, (2**16,))[0]
    assert (out - exact).abs().max() < 2e-6
    assert (out.double().square().mean() - 1).abs() < 6 * math.sqrt(2 / 2**16)


@pytest.mark.usefixtures("kernels")
def test_the_ends_of_every_quarter_turn_and_of_the_radius(device: torch.device) -> None:
    corners = [0, 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 2**29, 2**32 - 2, 2**32 - 1]
    words = torch.tensor(corners + [2**28 * k + 12345 for k in range(4)], device=device)
    first, second = (grid.flatten() for grid in torch.meshgrid(words, words, indexing="ij"))
    out = torch.empty((2, 256), device=device)
    _write_box_muller[1,](first, second, out, 256)
    exact = torch.stack(_box_muller(first, second))
    assert torch.isfinite(out).all()
    assert (out - exact).abs().max() < 2e-6
    largest = torch.hypot(exact[0], exact[1]).max().item()
    assert largest == pytest.approx(math.sqrt(66 * math.log(2)), abs=1e-6)
