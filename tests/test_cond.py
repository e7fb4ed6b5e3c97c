"""Conditions: what is left out stays out, and nothing else changes."""

import torch
from torch import Tensor

from fasttrain.cond import Cond, Nothing, Text, concatenated

EMPTY = Text(torch.full((1, 3, 2), 9.0), torch.tensor([1]), torch.full((1, 4), 8.0))
WHERE = torch.tensor([True, False, True])


def full() -> Cond:
    text = Text(torch.arange(18.0).reshape(3, 3, 2), torch.tensor([3, 2, 1]), torch.arange(12.0).reshape(3, 4))
    return Cond(torch.tensor([4, 5, 6]), text, torch.arange(6.0).reshape(3, 2))


def test_semantics_are_left_out_where_asked_and_controls_stay():
    cond = Nothing(label=10, text=EMPTY).instead_of_semantics(full(), WHERE)
    assert cond.labels is not None and cond.text is not None and cond.controls is not None
    assert cond.labels.tolist() == [10, 5, 10] and cond.text.length.tolist() == [1, 2, 1]
    assert (cond.text.tokens[WHERE] == 9).all() and torch.equal(cond.text.tokens[1], full().text.tokens[1])
    assert (cond.text.pooled[WHERE] == 8).all() and torch.equal(cond.text.pooled[1], full().text.pooled[1])
    assert torch.equal(cond.controls, full().controls) and cond.controlled is None


def test_controls_are_left_out_where_asked_and_stay_out():
    nothing = Nothing(controls=True)
    once = nothing.instead_of_controls(full(), WHERE)
    twice = nothing.instead_of_controls(once, torch.tensor([False, True, False]))
    assert once.controlled is not None and once.controlled.tolist() == [False, True, False]
    assert twice.controlled is not None and not twice.controlled.any()
    assert torch.equal(once.labels, full().labels)


def test_what_is_not_there_needs_no_standing_in_for():
    only = Cond(labels=torch.tensor([1, 2]))
    nothing = Nothing(label=7, text=EMPTY, controls=True)
    without = nothing.instead_of_controls(nothing.instead_of_semantics(only, torch.tensor([True, True])), torch.tensor([True, True]))
    assert without.labels is not None and without.labels.tolist() == [7, 7]
    assert without.text is None and without.controls is None and without.controlled is None
    assert not Nothing(controls=True).has_semantics and Nothing(text=EMPTY).has_semantics


def test_batches_come_apart_and_together_again():
    def tensors(cond: Cond) -> list[Tensor]:
        found: list[Tensor] = []
        cond.map(lambda part: found.append(part) or part)  # type: ignore[func-returns-value]
        return found

    whole = Nothing(controls=True).instead_of_controls(full(), WHERE)
    again = concatenated([whole[:1], whole[torch.tensor([1, 2])]])
    assert len(tensors(whole)) == 6
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(again), strict=True))
    assert tensors(concatenated([Cond(), Cond()])) == []
