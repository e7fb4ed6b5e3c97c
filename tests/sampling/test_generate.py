"""Numbered samples: the same whatever the ranks and batches."""

import dataclasses

import pytest
import torch
from fasttrain_kernels.philox import Purpose, normal
from torch import Tensor

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.prediction import PREDICTIONS
from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.errors import UserError
from fasttrain.sampling.generate import Generator
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
        num_classes=3,
        nothing=Nothing(3),
        guidance=1.5,
        seed=torch.tensor(5),
    )
    return dataclasses.replace(plain, **changes)


def run(count: int, batch: int, world_size: int = 1, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """All samples in order of number, and how often each rank called its model."""
    batches, calls = [], []
    for rank in range(world_size):
        model = Network()
        batches += generator(model).generate(count, batch, labels=labels, rank=rank, world_size=world_size)
        calls.append(model.calls)
    numbers, classes, x0 = (torch.cat(column) for column in zip(*batches, strict=True))
    order = numbers.argsort()
    return numbers[order], classes[order], x0[order], calls


@pytest.mark.parametrize(("batch", "world_size"), [(11, 1), (4, 1), (1, 1), (2, 2), (3, 4), (4, 3), (2, 7), (16, 2)])
def test_ranks_and_batches_do_not_change_the_samples(batch: int, world_size: int) -> None:
    numbers, classes, x0, calls = run(11, batch, world_size)
    _, _, alone, _ = run(11, 64)
    assert numbers.tolist() == list(range(11)) and classes.tolist() == [i % 3 for i in range(11)]
    assert torch.equal(x0, alone) and x0.dtype == torch.float32
    assert len(set(calls)) == 1, "under ZeRO-3 a rank that calls its model less often than another leaves it waiting"


def test_noise_is_that_of_the_sample_number() -> None:
    seen: list[Tensor] = []

    def first_input(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append(x_t)
        return x_t

    schedule = SCHEDULES.build("cosine")
    list(generator(Network(), model=first_input, guidance=1.0, sampler=Heun(steps=1)).generate(5, 2))
    _, sigma = schedule.alpha_sigma(torch.tensor(991))
    expected = sigma * normal(torch.tensor(5), torch.arange(5), (1, 4, 4), Purpose.SAMPLE).double()
    torch.testing.assert_close(torch.cat(seen), expected.float(), rtol=1e-6, atol=0)


def test_given_labels_are_used() -> None:
    labels = torch.tensor([2, 2, 0, 1, 2])
    _, classes, x0, _ = run(5, 2, labels=labels)
    _, _, taking_turns, _ = run(5, 2)
    assert torch.equal(classes, labels)
    assert torch.equal((x0 == taking_turns).all(dim=(1, 2, 3)), labels == torch.arange(5) % 3)


def test_unconditional_samples_are_all_of_class_0() -> None:
    made = list(generator(Network(), num_classes=0, nothing=Nothing(), guidance=1.0).generate(3, 3))
    assert made[0].labels.tolist() == [0, 0, 0]


def test_progress_adds_up_and_no_graph_is_kept() -> None:
    added: list[int] = []
    weight = torch.ones((), requires_grad=True)
    made = list(generator(Network(), model=lambda x, t, y: x * weight).generate(7, 3, progress=added.append))
    assert added == [3, 3, 1] and not any(batch.x0.requires_grad for batch in made)


@pytest.mark.parametrize(
    ("count", "batch", "labels", "message"),
    [
        (0, 4, None, "at least 1"),
        (4, 0, None, "at least 1"),
        (4, 4, torch.zeros(3, dtype=torch.int64), "4 samples need 4 class labels"),
        (2, 4, torch.tensor([0, 3]), r"in \[0, 3\), got 0 to 3"),
    ],
)
def test_impossible_requests_are_refused(count: int, batch: int, labels: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(generator(Network()).generate(count, batch, labels=labels))
