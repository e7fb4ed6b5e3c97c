"""Training with every kernel on and with every kernel off, 50 steps on digits: losses and weights agree within an error budget.

    python -m benchmarks.parity [--steps 50] [--device cpu|cuda] [--out FOLDER]

On a GPU the kernels run natively, elsewhere in Triton's interpreter. The budget is measured, not chosen: training amplifies rounding, so
the references are run again with nothing but their rounding changed (in float64; with each batch in reverse order), and the kernels may
drift from the reference twice as far as those do, losses at every step and every weight and average at the end. Writes parity.json and
parity.svg; the exit status is 1 if a run drifts further.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment, results_folder
from benchmarks.parity_runs import BATCH, MODELS, Outcome, Variant, running, train
from benchmarks.plots import parity_lines
from benchmarks.stage import Stage

FACTOR = 2.0
FLOOR = 8 * torch.finfo(torch.float32).eps
"""Relative: where the references happen to agree to the last bit, a few roundings more are no fault."""

REFERENCE = Variant("reference", "reference")
KERNELS = Variant("kernels", "triton")
OTHER_ROUNDINGS = (
    Variant("reference in float64", "reference", dtype=torch.float64),
    Variant("reference, batches reversed", "reference", reversed_batch=True),
)


def drifts(outcome: Outcome, reference: Outcome) -> list[float]:
    """How far the losses are from the reference's, step by step."""
    return [abs(ours - theirs) for ours, theirs in zip(outcome.losses, reference.losses, strict=True)]


def loss_budget(others: Sequence[Outcome], reference: Outcome) -> list[float]:
    """What the kernels may be off by at each step: twice the furthest drift so far of a run that differs in rounding only."""
    furthest = itertools.accumulate((max(step) for step in zip(*(drifts(other, reference) for other in others), strict=True)), max)
    return [FACTOR * drift + FLOOR * abs(loss) for drift, loss in zip(furthest, reference.losses, strict=True)]


def weight_faults(outcome: Outcome, others: Sequence[Outcome], reference: Outcome) -> dict[str, dict[str, float]]:
    """The weights and averages that have drifted too far, by name: their distance from the reference's and what was allowed."""
    faults = {}
    for name, exact in reference.weights.items():
        allowed = FACTOR * max(_distance(other.weights[name], exact) for other in others) + FLOOR * exact.norm().item()
        if not (found := _distance(outcome.weights[name], exact)) <= allowed:
            faults[name] = {"distance": found, "allowed": allowed}
    return faults


def _distance(left: Tensor, right: Tensor) -> float:
    return (left - right).norm().item()


def compare(model: str, steps: int, device: torch.device, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All runs of one model, and whether the one with the kernels stays within the budget."""
    outcomes: dict[str, Outcome] = {}
    launched: Counter[str] = Counter()
    for variant in (REFERENCE, *OTHER_ROUNDINGS, KERNELS):
        with running(variant, device) as launches:
            outcomes[variant.name] = train(model, variant, steps, device)
        launched.update(map(operation_of, launches))
        say(f"{model}, {variant.name}: loss {outcomes[variant.name].losses[0]:.6f} to {outcomes[variant.name].losses[-1]:.6f}")
    return judged(outcomes) | {"launches": dict(launched)}


def operation_of(launch: Any) -> str:
    """The operation that a kernel was launched for: its file's name, but for the norms, which share their kernels."""
    if not launch.kernel.fn.__module__.endswith(".norm_kernels"):
        return launch.kernel.fn.__module__.rpartition(".")[2].removesuffix("_kernels")
    given = launch.bound()
    adaptive = "gated_adaln" if given.get("gate") is not None else "adaln"
    return adaptive if given["ONE_PLUS"] else "residual_norm"


def judged(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """The figures of one model's runs, by variant's name."""
    reference, kernels = outcomes[REFERENCE.name], outcomes[KERNELS.name]
    others = [outcomes[variant.name] for variant in OTHER_ROUNDINGS]
    budget, found = loss_budget(others, reference), drifts(kernels, reference)
    late = [step for step, (drift, allowed) in enumerate(zip(found, budget, strict=True), start=1) if not drift <= allowed]
    faults = weight_faults(kernels, others, reference)
    apart = {name: _relative(outcome, reference) for name, outcome in outcomes.items() if outcome is not reference}
    return {
        "agree": not late and not faults,
        "steps_beyond_budget": late,
        "weights_beyond_budget": faults,
        "largest_share_of_budget": max(drift / allowed for drift, allowed in zip(found, budget, strict=True)),
        "final_weights_apart": apart,
        "losses": {"reference": reference.losses, "kernels": kernels.losses},
        "differences": {**{v.name: drifts(outcomes[v.name], reference) for v in (*OTHER_ROUNDINGS, KERNELS)}, "budget": budget},
    }


def _relative(outcome: Outcome, reference: Outcome) -> float:
    """Distance of all final weights and averages from the reference's, as a share of their norm."""
    apart, norm = (torch.cat([t.flatten() for t in tensors]).norm().item() for tensors in _both(outcome, reference))
    return apart / norm


def _both(outcome: Outcome, reference: Outcome) -> tuple[list[Tensor], list[Tensor]]:
    return [outcome.weights[name] - exact for name, exact in reference.weights.items()], list(reference.weights.values())


def main() -> int:
    """Runs all models. The exit status is 1 when one is beyond its budget or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no model is begun that would not end within this")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    args = parser.parse_args()
    device = torch.device(args.device)
    out = args.out or results_folder(device)
    how = "natively" if device.type == "cuda" else "in Triton's interpreter"
    settings = {"steps": args.steps, "batch": BATCH, "precision": "fp32", "kernels_run": how, "factor": FACTOR, "floor": FLOOR}
    stage = Stage(out / "parity.json", "parity", environment(device), settings, args.seconds)
    agree = [stage.case(lambda m=model: compare(m, args.steps, device), model=model).get("agree", False) for model in MODELS]
    (out / "parity.svg").write_text(parity_lines(stage.result))
    for case in stage.result["cases"]:
        verdict = "agree" if case.get("agree") else "DO NOT AGREE"
        print(f"{case['case']['model']}: {verdict}, at most {case.get('largest_share_of_budget')} of the budget")
    return 0 if all(agree) else 1


if __name__ == "__main__":
    raise SystemExit(main())
