"""Every operation of fasttrain_kernels against eager PyTorch, torch.compile of the same region, and other libraries.

    python -m benchmarks.kernels [--digest] [--device cpu --smoke] [--seconds 540] [--out FOLDER]

Forward and backward are timed apart, with a cold L2, in interleaved rounds (timing.py), at widths 768, 1024, 1152 and 1536 and 256, 258
and 1024 tokens: once at a batch whose first input alone is five times the L2, once at 32 images. GB/s are the operation's minimum bytes
(its docstring's, not what it happens to move) over the time: a share of the copy bandwidth measured in the same run, and of the
datasheet's. Each arm's outputs and gradients are checked at the very inputs it is timed on; one that fails has no speed.
Writes kernels.json after every case, and kernels.svg.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.cases import CASES, Case, Inputs, Shape
from fasttrain_kernels.dispatch import here

from benchmarks import optimizer_pass
from benchmarks.arms import Arm, Region, absent, arms, fault
from benchmarks.environment import environment, results_folder, timed_device
from benchmarks.limits import copy_bandwidth, several_caches
from benchmarks.plots import kernel_bars
from benchmarks.stage import Stage, described, lost_device
from benchmarks.timing import Clock, flat, graph_series, host_seconds, interleaved, ratio, spread

TOKENS = (256, 258, 1024)
SMALL_BATCH = 32
DRAWN = 7
"""Samples drawn on the CPU; a larger batch repeats them. No other size of an input is 7, which tells the batch dimension."""
FIRST = ("gated_adaln", "residual_norm", "adaln", "bias_gelu", "qk_norm")
"""The operations that move most of a step's bytes, in the order in which a short stage takes them."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    repeats: int
    digest: bool
    smoke: bool
    operations: tuple[str, ...] = tuple(CASES)

    @property
    def backend(self) -> str:
        # Inductor's C++ for a CPU takes half a minute a region, and no speed is claimed there.
        return "aot_eager" if self.smoke else "inductor"


@dataclass(frozen=True)
class Point:
    """One operation at one size."""

    operation: str
    options: dict[str, Any]
    sample: Shape
    batch: int

    def keys(self) -> dict[str, Any]:
        """Its name in the result."""
        settings = ", ".join(f"{key} {value}" for key, value in self.options.items() if isinstance(value, str | int | float))
        return {"operation": self.operation, "options": settings, "sample": list(self.sample), "batch": self.batch}


def points(effort: Effort, device: torch.device) -> Iterator[Point]:
    """What is measured, the most telling first: D = 1152 at 256 tokens for every operation, then the other widths, tokens and settings."""
    names = [name for name in (*FIRST, *CASES) if name in effort.operations and name not in optimizer_pass.OPERATIONS]
    if effort.smoke:
        yield from (Point(name, CASES[name].options[0], CASES[name].shapes[1][1:], 2) for name in dict.fromkeys(names))
        return
    plan = [(name, options, sample) for name in dict.fromkeys(names) for options in CASES[name].options for sample in samples(CASES[name])]
    plan.sort(key=lambda entry: _priority(*entry))
    for name, options, sample in plan:
        if not effort.digest:
            yield from (Point(name, options, sample, batch) for batch in _batches(sample, device))
        elif _priority(name, options, sample)[0] == 0:
            yield Point(name, options, sample, _batches(sample, device)[0])


def samples(case: Case) -> list[Shape]:
    """One sample of the first input at each width of `case.real`, with each number of tokens where there are an image's tokens."""
    widths = [(tokens, *sample[1:]) for tokens in TOKENS for sample in case.real if len(sample) == 2 and sample[0] in TOKENS]
    return widths or list(case.real)


def _priority(name: str, options: dict[str, Any], sample: Shape) -> tuple[int, int, int]:
    case = CASES[name]
    telling = options == case.options[0] and sample == case.real[2 % len(case.real)]
    return int(not telling), TOKENS.index(sample[0]) if sample and sample[0] in TOKENS else 0, case.options.index(options)


def _batches(sample: Shape, device: torch.device) -> list[int]:
    """The batches, the more telling first: noise and loss are small in training, and launch-bound."""
    if not sample:
        return [SMALL_BATCH]
    large = max(SMALL_BATCH, -(-several_caches(device) // (2 * math.prod(sample))))
    return [large, SMALL_BATCH] if len(sample) == 2 else [SMALL_BATCH, large]


def grown(case: Case, point: Point, device: torch.device) -> Inputs:
    """Inputs of the point's batch: a few samples drawn as the tests draw them, repeated on the device."""
    if point.batch <= DRAWN:
        return case.inputs((point.batch, *point.sample), torch.bfloat16, device)
    drawn = case.inputs((DRAWN, *point.sample), torch.bfloat16, device)
    copies = -(-point.batch // DRAWN)
    per_sample = {name for name, t in drawn.items() if t.dim() > 0 and t.shape[0] == DRAWN}
    return {name: t.repeat(copies, *[1] * (t.dim() - 1))[: point.batch] if name in per_sample else t for name, t in drawn.items()}


def measure(point: Point, effort: Effort, clock: Clock, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Times of every arm of one point, and what they mean."""
    torch.compiler.reset()
    case, device = CASES[point.operation], clock.device
    inputs = grown(case, point, device)
    elements = case.elements(inputs)
    able, refused = _able(point, case, inputs, effort, device)
    regions = {arm.name: Region(arm.call, inputs, case, point.options) for arm in able}
    directions: dict[str, Any] = {"forward": {name: (region.forward, None) for name, region in regions.items()}}
    if case.differentiable:
        directions["backward"] = {name: (region.backward, region.forward) for name, region in regions.items()}
    figures: dict[str, Any] = {"arms": {name: {} for name in regions}, "refused": refused, "absent": absent(point.operation)}
    for region in regions.values():
        region.both()
    for number, (direction, runs) in enumerate(directions.items()):
        series = interleaved(clock, runs, effort.rounds, effort.repeats)
        bytes_moved = case.minimum[number] * elements
        for name, rounds in series.items():
            figures["arms"][name][direction] = {"seconds": spread(flat(rounds)), **_rates(bytes_moved, flat(rounds), ceilings)}
        if {"compile", "ours"} <= series.keys():
            figures[f"{direction}_compile_over_ours"] = ratio(series["compile"], series["ours"])
    for name, region in regions.items():
        figures["arms"][name]["host_seconds"] = host_seconds(region.forward, device)
        if point.batch == SMALL_BATCH and name in ("compile", "ours") and device.type == "cuda":
            figures["arms"][name]["graph"] = _replayed(region, clock, effort.repeats)
    return {**figures, "told": _told(figures)}


def _told(figures: dict[str, Any]) -> str:
    """Our share of the copy bandwidth, how much longer the compiled reference takes, and which arms have no speed and why."""
    ours = figures["arms"].get("ours", {})
    told = [f"{way} {100 * ours[way]['of_copy']:.0f} % of copy" for way in ("forward", "backward") if way in ours]
    told += [f"{key.replace('_', ' ')} {figures[key]['median']:.2f}" for key in figures if key.endswith("_over_ours")]
    return "; ".join([*told, *(f"{name} refused: {why[:150]}" for name, why in figures["refused"].items())])


def _replayed(region: Region, clock: Clock, repeats: int) -> dict[str, Any]:
    """Times of forward and backward as one CUDA graph; or why it cannot be one, which takes no other figure away."""
    try:
        return {"seconds": spread(graph_series(region.both, clock, repeats))}
    except Exception as error:
        if lost_device(error):
            raise
        return {"error": described(error)}


def _able(point: Point, case: Case, inputs: Inputs, effort: Effort, device: torch.device) -> tuple[list[Arm], dict[str, str]]:
    """The arms that pass the check at these inputs (and so have run once), and why the others do not."""
    able, refused = [], {}
    plain = Arm("eager", case.reference, "")
    for arm in arms(point.operation, case, point.options, effort.backend, device):
        try:
            wrong = fault(arm, plain, case, inputs, point.options)
        except Exception as error:
            if lost_device(error):
                raise
            wrong = described(error)[:1000]
        if wrong is None:
            able.append(arm)
        else:
            refused[arm.name] = wrong
    return able, refused


def _rates(bytes_moved: float, seconds: list[float], ceilings: dict[str, Any]) -> dict[str, Any]:
    rate = bytes_moved / spread(seconds)["median"]
    paper = ceilings["datasheet"]
    of_paper = rate / paper if paper else None
    return {"bytes": bytes_moved, "bytes_per_second": rate, "of_copy": rate / ceilings["bytes_per_second"], "of_datasheet": of_paper}


def run(device: torch.device, effort: Effort, out: Path, seconds: float) -> Stage:
    """The whole stage."""
    told = environment(device)
    settings = {"dtype": "bfloat16", "rounds": effort.rounds, "repeats": effort.repeats, "smoke": effort.smoke, "digest": effort.digest}
    stage = Stage(out / "kernels.json", "kernels", told, {**settings, "kernels": here(), "backend": effort.backend}, seconds)
    clock = Clock(device)
    ceilings = copy_bandwidth(device)
    stage.note(copy=ceilings)
    for name in optimizer_pass.OPERATIONS:
        if name in effort.operations:
            optimizer_pass.run(stage, clock, ceilings, effort.rounds, effort.repeats, effort.smoke)
    for point in points(effort, device):
        stage.case(lambda point=point: measure(point, effort, clock, ceilings), **point.keys())
    stage.note(environment_after=environment(device))
    (out / "kernels.svg").write_text(kernel_bars(stage.result))
    return stage


def main() -> int:
    """Measures, and says where the result is. The exit status is 1 when a case ended in an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--operations", nargs="+", choices=CASES, default=tuple(CASES), help="only these")
    parser.add_argument("--digest", action="store_true", help="only D = 1152 at 256 tokens, each operation in its first setting")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs: no figure means anything")
    parser.add_argument("--seconds", type=float, default=520.0, help="the stage's limit")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>, or build/smoke")
    args = parser.parse_args()
    device = timed_device(args.device, args.smoke)
    rounds, repeats = (2, 2) if args.smoke else (5, 10)
    effort = Effort(rounds, repeats, args.digest, args.smoke, tuple(args.operations))
    stage = run(device, effort, args.out or (Path("build/smoke") if args.smoke else results_folder(device)), args.seconds)
    print(f"written: {stage.path}")
    return 1 if stage.failed() else 0


if __name__ == "__main__":
    raise SystemExit(main())
