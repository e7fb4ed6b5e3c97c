"""The curriculum over timesteps: its distribution at every stage of the run, and that it is a function of seed and position alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.diffusion.curriculum import Curriculum
from fasttrain.diffusion.log_normal import LogNormal
from fasttrain.diffusion.schedule import SCHEDULES, Schedule
from fasttrain.diffusion.timesteps import TIMESTEPS
from fasttrain.errors import UserError

SEED = torch.tensor(77)
LATE = 10**9
FLOW = SCHEDULES.build("flow")  # on whose path t / T is u


def exact(u: Tensor, mean: float, std: float, share: float) -> Tensor:
    """The mixture's distribution function from its definition."""
    below = torch.special.ndtr((u - mean) / std)
    zero, one = (0.5 * math.erfc((mean - end) / std / 2**0.5) for end in (0.0, 1.0))
    return (1 - share) * u + share * (below - zero) / (one - zero)


def distance(u: Tensor, mean: float, std: float, share: float) -> float:
    """Kolmogorov and Smirnov's, from the exact mixture."""
    cumulative, n = exact(u.sort().values, mean, std, share), len(u)
    rank = torch.arange(n, dtype=torch.float64)
    return torch.maximum((rank + 1) / n - cumulative, cumulative - rank / n).max().item()


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.25), (0.3, 0.1), (0.0, 0.02), (1.0, 0.5)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_draws_follow_the_mixture(share: float, mean: float, std: float, stratified: bool) -> None:
    """`n` draws at about one place in a run so long that s does not change over them; at s = 1, past the curriculum's end."""
    n, images = 20_000, 10**14
    made = Curriculum(mean, std, images, stratified).on(FLOW)
    position = round(share * images) + torch.arange(n)
    u = made.draw(SEED, position)
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    # A random sample passes 1.63 / sqrt(n) once in a hundred times; the seed is fixed. A stratified one is ten times nearer.
    assert distance(u, mean, std, share) < (1.63 / n**0.5 if not stratified else 0.001)


@pytest.mark.parametrize("spec", [*SCHEDULES.names(), {"name": "flow", "shift": 3}, {"name": "cosine", "num_timesteps": 7}], ids=str)
def test_at_its_end_the_timesteps_are_normal_under_every_schedule(spec: str | dict[str, Any]) -> None:
    """t / T, not the schedule's uniform numbers; of whole timesteps, each has the normal's share between it and the next."""
    n, schedule = 20_000, SCHEDULES.build(spec)
    t = schedule.timestep(Curriculum(0.3, 0.1, 1).on(schedule).draw(SEED, LATE + torch.arange(n)))
    if t.is_floating_point():
        assert distance(t / schedule.num_timesteps, 0.3, 0.1, 1.0) < 0.002
        return
    below = exact(torch.arange(schedule.num_timesteps + 1, dtype=torch.float64) / schedule.num_timesteps, 0.3, 0.1, 1.0)
    counts = torch.bincount(t, minlength=schedule.num_timesteps) / n
    torch.testing.assert_close(counts, below.diff(), rtol=0, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_at_its_beginning_the_timesteps_are_the_schedule_s_own(name: str) -> None:
    schedule, position = SCHEDULES.build(name), torch.arange(2000)
    plain = schedule.timestep(TIMESTEPS.build("stratified").draw(SEED, position))
    torch.testing.assert_close(schedule.timestep(Curriculum(images=10**15).on(schedule).draw(SEED, position)), plain, rtol=1e-6, atol=1e-6)


def test_a_schedule_that_never_draws_most_timesteps_is_refused() -> None:
    narrow: Schedule = LogNormal(mean=-1.2, std=0.1)
    with pytest.raises(UserError, match="wider std"):
        Curriculum(images=10).on(narrow)


def test_the_share_grows_over_the_run_and_stays() -> None:
    """By the mean: 1/2 of uniform draws, and that of the normal cut off at both ends."""
    made, n = Curriculum(mean=0.3, std=0.25, images=100_000).on(FLOW), 2000
    normal = made.draw(SEED, LATE + torch.arange(n)).mean().item()
    a, b = -0.3 / 0.25, 0.7 / 0.25
    density = [math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (a, b)]
    within = 0.5 * (math.erf(b / 2**0.5) - math.erf(a / 2**0.5))
    assert normal == pytest.approx(0.3 + 0.25 * (density[0] - density[1]) / within, abs=1e-3)
    for start, share in ((0, 0.01), (25_000, 0.26), (50_000, 0.51), (99_000, 1.0), (5_000_000, 1.0)):
        mean = made.draw(SEED, start + torch.arange(n)).mean().item()
        assert mean == pytest.approx((1 - share) * 0.5 + share * normal, abs=5e-3)


def test_it_begins_as_stratified_does() -> None:
    position = torch.arange(50)
    made = Curriculum(images=10**15).on(FLOW).draw(SEED, position)
    torch.testing.assert_close(made, TIMESTEPS.build("stratified").draw(SEED, position), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_any_number_of_ranks_draws_the_same(ranks: int) -> None:
    made, position = Curriculum(images=300).on(FLOW), torch.arange(100, 340)
    whole, shared = made.draw(SEED, position), torch.empty(240, dtype=torch.float64)
    for rank in range(ranks):
        shared[rank::ranks] = made.draw(SEED, position[rank::ranks])
    assert torch.equal(shared, whole)


def test_an_open_number_of_images_is_told() -> None:
    with pytest.raises(UserError, match=r"diffusion\.timesteps\.images: not set"):
        Curriculum().on(FLOW)


@pytest.mark.parametrize("params", [{"std": 0}, {"std": math.nan}, {"mean": 1.1}, {"mean": -0.1}, {"images": 0}, {"images": 10**19}])
def test_impossible_curricula_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        TIMESTEPS.build({"name": "curriculum", **params})
