"""The budget of drift: what rounding does is allowed, twice, and what a fault does is not."""

import json
from typing import Any

import pytest
import torch
from fasttrain_kernels.dispatch import OPERATIONS

from benchmarks import parity
from benchmarks.environment import RESULTS
from benchmarks.parity_runs import MODELS, Outcome, Variant, running, train

CPU = torch.device("cpu")


def _outcome(loss_off: float = 0.0, weight_off: float = 0.0, late: float = 0.0) -> Outcome:
    losses = [0.3 + loss_off * step for step in range(10)]
    losses[-1] += late
    return Outcome(losses, {"master weight": torch.ones(4, dtype=torch.float64) + weight_off})


def _judged(kernels: Outcome) -> dict[str, Any]:
    names = [variant.name for variant in parity.OTHER_ROUNDINGS]
    others = dict(zip(names, (_outcome(1e-6, 1e-6), _outcome(-1e-6, -1e-6)), strict=True))
    return parity.judged({"reference": _outcome(), **others, "kernels": kernels})


def test_what_drifts_as_rounding_does_agrees() -> None:
    found = _judged(_outcome(1.5e-6, 1.5e-6))
    assert found["agree"] and 0.5 < found["largest_share_of_budget"] < 1


@pytest.mark.parametrize(
    ("kernels", "steps", "weights"),
    [
        (_outcome(2.5e-6, 0.0), list(range(2, 11)), []),
        (_outcome(late=3e-5), [10], []),
        (_outcome(0.0, 3e-6), [], ["master weight"]),
        (_outcome(late=float("nan")), [10], []),
        (_outcome(0.0, float("nan")), [], ["master weight"]),
    ],
    ids=["losses", "one late loss", "weights", "a loss that is no number", "a weight that is no number"],
)
def test_what_drifts_further_does_not(kernels: Outcome, steps: list[int], weights: list[str]) -> None:
    found = _judged(kernels)
    assert not found["agree"]
    assert found["steps_beyond_budget"] == steps and list(found["weights_beyond_budget"]) == weights


def test_a_real_fault_is_far_beyond_what_rounding_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of the DiT by the references, one of them with a learning rate that is wrong in the fifth digit."""
    outcomes = {variant.name: train("dit", variant, 3, CPU) for variant in (parity.REFERENCE, *parity.OTHER_ROUNDINGS)}
    assert parity.judged({**outcomes, "kernels": outcomes["reference, batches reversed"]})["agree"]
    monkeypatch.setattr("benchmarks.parity_runs.LR", 1e-3 * (1 + 1e-4))
    found = parity.judged({**outcomes, "kernels": train("dit", parity.REFERENCE, 3, CPU)})
    assert not found["agree"] and len(found["weights_beyond_budget"]) > 10


def test_the_committed_runs_agree_and_used_every_operation() -> None:
    result = json.loads((RESULTS / "cpu" / "parity.json").read_text())
    assert result["settings"]["steps"] == 50
    assert [case["case"]["model"] for case in result["cases"]] == list(MODELS)
    assert all(case["agree"] for case in result["cases"])
    launched: set[str] = set().union(*(case["launches"] for case in result["cases"]))
    assert set(OPERATIONS) <= launched


def test_a_variant_that_is_not_interpreted_launches_nothing() -> None:
    with running(Variant("reference", "reference"), CPU) as launches:
        pass
    assert launches == []
