"""Agreement counted by hand."""

import numpy as np

from fasttrain.evaluation.agreement import Agreement


def test_each_class_counts_the_samples_asked_for_it() -> None:
    asked, seen = np.array([0, 0, 0, 2, 2, 2, 2]), np.array([0, 1, 0, 2, 2, 2, 0])
    told = Agreement.of(asked, seen, 3).told(("zero", "one", "two"))
    assert told == {"share": 5 / 7, "classes": {"zero": {"samples": 3, "share": 2 / 3}, "two": {"samples": 4, "share": 3 / 4}}}


def test_shares_of_processes_add_up() -> None:
    asked, seen = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1])
    parts = Agreement.none(2) + Agreement.of(asked[:1], seen[:1], 2) + Agreement.of(asked[1:], seen[1:], 2)
    assert parts.told("ab") == Agreement.of(asked, seen, 2).told("ab")
