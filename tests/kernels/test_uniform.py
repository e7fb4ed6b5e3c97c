"""Uniform numbers' own facts; what holds for every operation is in test_cases.py."""

import math

import pytest
import torch
from fasttrain_kernels.cases.noise import uniform_inputs
from fasttrain_kernels.philox import Purpose, philox
from fasttrain_kernels.uniform import GOLDEN_STEP, uniform
from scipy import stats

CPU = torch.device("cpu")
SEED = 0x1234_5678_9ABC_DEF0
SIX_SIGMA = 6.0
POSITIONS = (0, 1, 5, 2**31 - 1, 2**32 - 1, 2**32, 2**40 + 17, 2**63 - 1, -1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("seed", [0, -1, 2**32, SEED, -(2**63)])
def test_the_kernel_gives_the_same_bits(seed: int, stratified: bool, device: torch.device) -> None:
    position = torch.tensor(POSITIONS, device=device)
    for purpose in (Purpose.TIMESTEP, Purpose.FLIP):
        ours, plain = (uniform(seed, position, purpose, stratified=stratified, impl=impl) for impl in ("triton", "reference"))
        assert ours.dtype == torch.float64 and torch.equal(ours, plain)


def test_every_bit_of_the_integer_is_kept() -> None:
    position = torch.tensor(POSITIONS)
    first, _, _, _ = philox(SEED, 0, Purpose.FLIP, position)
    u = uniform(SEED, position, Purpose.FLIP)
    assert torch.equal((u * 2.0**32 - 0.5).long(), first)
    assert torch.equal(u < 0.5, first < 2**31)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_stratified_numbers_advance_by_the_golden_step(impl: str, device: torch.device) -> None:
    position = torch.tensor([0, *POSITIONS], device=device)
    bits = (uniform(SEED, position, Purpose.TIMESTEP, stratified=True, impl=impl) * 2.0**53).long().tolist()
    for n, now in zip(position.tolist(), bits, strict=True):
        ahead = (n * GOLDEN_STEP % 2**64) >> 11
        # The offset's own lower bits may carry one into the kept ones.
        assert (now - bits[0] - ahead) % 2**53 in (0, 1)


def test_independent_numbers_are_uniform_inside_the_open_interval() -> None:
    u = uniform(SEED, torch.arange(200_000), Purpose.TIMESTEP)
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert abs(((u[1:] - 0.5) * (u[:-1] - 0.5)).mean()) < SIX_SIGMA / 12 / math.sqrt(200_000)


def test_purposes_draw_apart() -> None:
    draws = [uniform(SEED, torch.arange(16), purpose) for purpose in Purpose]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(Purpose)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("stratified", [False, True])
def test_the_registered_operation_passes_torchs_own_checks(stratified: bool, device: torch.device) -> None:
    inputs = uniform_inputs((5,), torch.float32, device)
    torch.library.opcheck(torch.ops.fasttrain.uniform.default, (inputs["seed"], inputs["position"], int(Purpose.TIMESTEP), stratified))


@pytest.mark.gpu
def test_a_captured_graph_follows_seed_and_position(device: torch.device) -> None:
    inputs = uniform_inputs((64,), torch.float32, device)
    uniform(**inputs, purpose=Purpose.TIMESTEP, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = uniform(**inputs, purpose=Purpose.TIMESTEP, impl="triton")
    inputs["seed"].add_(1)
    inputs["position"].add_(2**33)
    graph.replay()
    assert torch.equal(captured, uniform(**inputs, purpose=Purpose.TIMESTEP, impl="reference"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("position", torch.zeros(2, 3, dtype=torch.int64), r"position must be \[B\], got \[2, 3\]"),
        ("position", torch.zeros(2), "position int64"),
        ("seed", torch.zeros(2, dtype=torch.int64), "seed must be one int64"),
        ("seed", torch.tensor(1, device="meta"), "seed is on meta, the other tensors on cpu"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uniform(**{**uniform_inputs((2,), torch.float32, CPU), name: value}, purpose=Purpose.FLIP)
