"""What numbered samples are asked to show: classes and prompts by turns, the same controls for all."""

import pytest
import torch

from fasttrain.cond import Text
from fasttrain.errors import UserError
from fasttrain.sampling.asked import Asked, check_labels

NUMBERS = torch.tensor([0, 1, 2, 3, 7, 100])


def test_classes_take_turns() -> None:
    cond = Asked(torch.tensor([3, 5, 8]))(NUMBERS)
    assert cond.labels.tolist() == [3, 5, 8, 3, 5, 5] and cond.text is None and cond.controls is None


def test_prompts_take_turns_and_are_padded_by_the_sample_s_number() -> None:
    tokens = torch.arange(2.0)[:, None, None].expand(2, 4, 3)
    seen: list[torch.Tensor] = []

    def pad(text: Text, numbers: torch.Tensor) -> Text:
        seen.append(numbers)
        return Text(text.tokens + numbers[:, None, None], text.length, text.pooled)

    asked = Asked(torch.tensor([0]), Text(tokens, torch.tensor([2, 4]), torch.arange(2.0)[:, None]), ("a", "b"), pad)
    cond = asked(NUMBERS)
    assert seen[0] is NUMBERS and cond.labels.tolist() == [0] * 6
    assert cond.text.length.tolist() == [2, 4, 2, 4, 4, 2] and cond.text.pooled[:, 0].tolist() == [0, 1, 0, 1, 1, 0]
    assert cond.text.tokens[:, 0, 0].tolist() == [0 + 0, 1 + 1, 0 + 2, 1 + 3, 1 + 7, 0 + 100]


def test_controls_are_the_same_for_all() -> None:
    cond = Asked(torch.tensor([0]), controls=torch.tensor([512.0, 384.0, 1.0]))(NUMBERS)
    assert cond.controls.tolist() == [[512.0, 384.0, 1.0]] * 6 and cond.controlled is None


@pytest.mark.parametrize(("labels", "classes"), [([0, 10], 10), ([-1], 10), ([1], 0)])
def test_classes_that_do_not_exist_are_refused(labels: list[int], classes: int) -> None:
    with pytest.raises(UserError, match=rf"class labels must lie in \[0, {max(classes, 1)}\), got {min(labels)} to {max(labels)}"):
        check_labels(labels, classes)
    check_labels([0], classes)
