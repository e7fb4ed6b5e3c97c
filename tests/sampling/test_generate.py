"""Numbered samples: the same whatever the ranks, batches and sampler."""

import dataclasses

import pytest
import torch
from fasttrain_kernels.philox import Purpose, normal
from torch import Tensor

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.prediction import PREDICTIONS
from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.errors import UserError
from fasttrain.sampling import Sampler
from fasttrain.sampling.asked import Asked
from fasttrain.sampling.diffusers import Ddim, Ddpm, DpmSolver
from fasttrain.sampling.euler import Euler
from fasttrain.sampling.generate import DRAW, Generator
from fasttrain.sampling.guidance import Guidance
from fasttrain.sampling.heun import Heun


class Network:
    """Works on each sample by itself, without matrix products, so that batches cannot change its rounding."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls += 1
        return torch.tanh(x_t * (1 + cond.labels[:, None, None, None] / 10)) * (1 - t[:, None, None, None] / 2000)


def generator(network: Network, **changes: object) -> Generator:
    plain = Generator(
        model=network,
        schedule=SCHEDULES.build("cosine"),
        prediction=PREDICTIONS.build("v"),
        sampler=Heun(steps=3),
        shape=(1, 4, 4),
        conditions=Asked(torch.arange(3)),
        nothing=Nothing(3),
        guidance=Guidance(1.5),
        seed=torch.tensor(5),
    )
    return dataclasses.replace(plain, **changes)


def run(count: int, batch: int, world_size: int = 1, **changes: object) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """All samples in order of number, and how often each rank called its model."""
    batches, calls = [], []
    for rank in range(world_size):
        model = Network()
        batches += generator(model, **changes).generate(count, batch, rank=rank, world_size=world_size)
        calls.append(model.calls)
    numbers, classes, x0 = (torch.cat(column) for column in zip(*((b.number, b.cond.labels, b.x0) for b in batches), strict=True))
    order = numbers.argsort()
    return numbers[order], classes[order], x0[order], calls


@pytest.mark.parametrize(("batch", "world_size"), [(11, 1), (4, 1), (1, 1), (2, 2), (3, 4), (4, 3), (2, 7), (16, 2)])
def test_ranks_and_batches_do_not_change_the_samples(batch: int, world_size: int) -> None:
    numbers, classes, x0, calls = run(11, batch, world_size)
    _, _, alone, _ = run(11, 64)
    assert numbers.tolist() == list(range(11)) and classes.tolist() == [i % 3 for i in range(11)]
    assert torch.equal(x0, alone) and x0.dtype == torch.float32
    assert len(set(calls)) == 1, "under ZeRO-3 a rank that calls its model less often than another leaves it waiting"


@pytest.mark.parametrize("sampler", [Euler(4), Ddim(4), Ddim(4, eta=0.7), Ddpm(4), DpmSolver(4)], ids=str)
@pytest.mark.parametrize(("batch", "world_size"), [(4, 1), (1, 1), (3, 2), (2, 4)])
def test_no_sampler_s_samples_depend_on_ranks_and_batches(batch: int, world_size: int, sampler: Sampler) -> None:
    if not isinstance(sampler, Euler):
        pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'fasttrain[latents]'")
    numbers, _, x0, _ = run(7, batch, world_size, sampler=sampler)
    assert numbers.tolist() == list(range(7)) and torch.equal(x0, run(7, 64, sampler=sampler)[2])


def test_each_draw_is_of_the_sample_number_and_its_own() -> None:
    """Draw 0 is what every sampler starts from; those of other numbers, draws and seeds are others."""
    drawn: list[Tensor] = []

    class Drawing(Euler):
        def __call__(self, model, schedule, prediction, noise, cond, dtype):
            drawn.extend(noise(draw) for draw in (0, 1, 2, 0))
            return drawn[-1]

    list(generator(Network(), sampler=Drawing(1)).generate(3, 3))
    for draw in (0, 1, 2):
        assert torch.equal(drawn[draw], normal(torch.tensor(5), torch.arange(3) + draw * DRAW, (1, 4, 4), Purpose.SAMPLE))
    assert torch.equal(drawn[0], drawn[3]) and len(torch.cat(drawn[:3]).unique()) == 9 * 16


def test_noise_is_that_of_the_sample_number() -> None:
    seen: list[Tensor] = []

    def first_input(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append(x_t)
        return x_t

    schedule = SCHEDULES.build("cosine")
    list(generator(Network(), model=first_input, guidance=Guidance(), sampler=Heun(steps=1)).generate(5, 2))
    _, sigma = schedule.alpha_sigma(torch.tensor(991))
    expected = sigma * normal(torch.tensor(5), torch.arange(5), (1, 4, 4), Purpose.SAMPLE).double()
    torch.testing.assert_close(torch.cat(seen), expected.float(), rtol=1e-6, atol=0)


def test_given_labels_are_used() -> None:
    labels = torch.tensor([2, 2, 0, 1, 2])
    _, classes, x0, _ = run(5, 2, conditions=Asked(labels))
    _, _, taking_turns, _ = run(5, 2)
    assert torch.equal(classes, labels)
    assert torch.equal((x0 == taking_turns).all(dim=(1, 2, 3)), labels == torch.arange(5) % 3)


def test_unconditional_samples_are_all_of_class_0() -> None:
    made = list(generator(Network(), conditions=Asked(torch.tensor([0])), nothing=Nothing(), guidance=Guidance()).generate(3, 3))
    assert made[0].cond.labels.tolist() == [0, 0, 0]


def test_progress_adds_up_and_no_graph_is_kept() -> None:
    added: list[int] = []
    weight = torch.ones((), requires_grad=True)
    made = list(generator(Network(), model=lambda x, t, y: x * weight).generate(7, 3, progress=added.append))
    assert added == [3, 3, 1] and not any(batch.x0.requires_grad for batch in made)


@pytest.mark.parametrize(("count", "batch"), [(0, 4), (4, 0), (-1, 4), (DRAW, 4)])
def test_impossible_requests_are_refused(count: int, batch: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        list(generator(Network()).generate(count, batch))
