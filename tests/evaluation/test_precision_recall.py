"""Precision and recall against their definition, image by image."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttrain.engine.distributed import Processes
from fasttrain.engine.together import divided
from fasttrain.evaluation import precision_recall as module
from fasttrain.evaluation.precision_recall import PrecisionRecall, Work, precision_recall, radii
from tests.ranks import run_ranks


def by_definition(points: Tensor, centres: Tensor, k: int) -> float:
    """The share of points p with |p - c| <= |c - its k-th nearest other centre| for a centre c. [Kynkaanniemi et al. 2019, Eq. 1]"""
    radii = [sorted(float(np.linalg.norm(c - o)) for j, o in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)]
    inside = [any(float(np.linalg.norm(p - c)) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return sum(inside) / len(inside)


def vectors(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) * scale + shift


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [1, 100, 1 << 25])
def test_both_are_what_the_definition_says(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    samples, reference = vectors(40, 0, 1.0, 1.2), vectors(53, 1)
    found = precision_recall(samples, reference, k)
    assert found.precision == by_definition(samples, reference, k)
    assert found.recall == by_definition(reference, samples, k)
    assert (found.k, found.samples, found.reference) == (k, 40, 53) and 0 < found.precision < 1 and 0 < found.recall < 1


def test_a_set_is_wholly_among_itself_and_not_among_another() -> None:
    one = vectors(30, 0)
    assert precision_recall(one, one)[:2] == (1.0, 1.0) and precision_recall(one, one + 100)[:2] == (0.0, 0.0)


def test_samples_that_copy_a_few_images_are_precise_and_recall_little() -> None:
    reference = vectors(200, 0)
    found = precision_recall(reference[:5].repeat(40, 1), reference)
    assert found.precision == 1 and found.recall == 5 / 200


def test_equal_images_are_at_no_distance() -> None:
    """Nor at what rounding leaves: balls of no size would hold some of their equals and not others."""
    one = torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = module._Centred.of(one, one.mean(dim=0))
    assert centred.squared(centred).diagonal().tolist() == [0.0] * 50
    assert precision_recall(one, one.repeat(4, 1)).precision == 1 and precision_recall(one + 1e-3, one.repeat(4, 1)).precision == 0


def test_a_far_mean_costs_no_digits() -> None:
    samples, reference = vectors(40, 0, 0.7, 0.4).double(), vectors(53, 1).double()
    assert precision_recall(samples + 1e8, reference + 1e8)[:2] == precision_recall(samples, reference)[:2]


def test_too_few_vectors_or_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 images of each kind, got 3 samples and 10"):
        precision_recall(vectors(3, 0), vectors(10, 1))
    with pytest.raises(ValueError, match="different lengths: 3 and 2"):
        precision_recall(vectors(9, 0), vectors(10, 1)[:, :2])


def test_radii_that_are_known_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = vectors(40, 0, 1.0, 1.2), vectors(53, 1)
    found, known, calls = precision_recall(samples, reference), radii(reference), []
    monkeypatch.setattr(module, "radii", lambda rows, k, divide: calls.append(len(rows)) or radii(rows, k))
    assert precision_recall(samples, reference, reference_radii=known) == found and calls == [40]
    assert precision_recall(samples, reference, reference_radii=known * 0)[0] == 0, "they are used"


def test_no_array_of_distances_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 1000)
    sizes: list[int] = []
    squared = module._Centred.squared
    monkeypatch.setattr(module._Centred, "squared", lambda self, others: [found := squared(self, others), sizes.append(found.numel())][0])
    precision_recall(vectors(300, 0), vectors(200, 1))
    assert max(sizes) <= 1000 and sum(sizes) == 300 * 200 + 300**2 + 200**2, "each distance of two sets is computed once"


def _divided(processes: Processes, block: int) -> tuple[PrecisionRecall, Tensor, int]:
    """What this rank is told, and of how many rows it computed the radii."""
    module.BLOCK = block
    random = torch.Generator().manual_seed(0)
    reference, samples = (torch.randn(count, 257, generator=random) * scale for count, scale in ((311, 1.0), (290, 0.98)))
    mine = []

    def noted(blocks: Sequence[slice], work: Work[Tensor]) -> list[Tensor]:
        def counted(some: Sequence[slice]) -> Tensor:
            done = work(some)
            mine.append(len(done))
            return done

        return divided(processes, blocks, counted)

    found = precision_recall(samples, reference, divide=partial(divided, processes))
    return found, radii(reference, divide=noted), mine[0]


def _divided_both(processes: Processes) -> list[tuple[PrecisionRecall, Tensor, int]]:
    """In 45 blocks of seven rows, and in one block, of which only one process has any."""
    return [_divided(processes, 7 * 311), _divided(processes, 1 << 20)]


def test_any_number_of_processes_finds_the_same_bit_for_bit_and_each_does_its_part() -> None:
    ((alone, together),) = run_ranks(1, _divided_both)
    found = run_ranks(2, _divided_both)
    assert 0 < alone[0].precision < 1 and 0 < alone[0].recall < 1 and alone[2] == together[2] == 311
    for many, one in found:
        assert (many[0], one[0]) == (alone[0], together[0]) and torch.equal(many[1], alone[1]) and torch.equal(one[1], together[1])
    assert sorted(many[2] for many, _ in found) == [22 * 7, 311 - 22 * 7] and sorted(one[2] for _, one in found) == [0, 311]
