"""Whole training steps, with optimizer and average: ours against eager and tuned, compiled PyTorch, by the protocol of a fair race.

    python -m benchmarks.train_step [--digest | --full | --captions] [--models dit-xl/2 ...] [--device cpu --smoke]
        [--seconds 520] [--out FOLDER]

One process, one device, the same weights, the same batch, the same attention backend (the fastest measured) for every arm. An arm's loss
and all its gradients are compared with the network in fp32 first; one that is off has no speed. Then the arms take turns, at least five
rounds; of each step the device's time is kept: median, p10, p90, and a bootstrap interval on the ratio to the best compiled baseline.
MFU is against the matrix rate measured in the same run, and the datasheet's. After the race: device time by kind of work, waits of the
host, each kernel off in turn, and the same step through DeepSpeed where that is installed. Writes step.json after every part.
"""

import argparse
import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.dispatch import Kernels, here
from torch import nn

from benchmarks import agreement, deepspeed_step
from benchmarks.categories import host_waits, profiled
from benchmarks.environment import environment, results_folder, timed_device
from benchmarks.limits import copy_bandwidth, matmul_rate, training_shapes
from benchmarks.networks import REFERENCE, build_network, choose_attention, config_of, wake
from benchmarks.plots import step_bars
from benchmarks.stage import NO_TIME, Stage, described, lost_device
from benchmarks.step_arms import ARMS, Spec, StepArm, free_memory, timed_steps
from benchmarks.timing import flat, ratio, spread, synchronize
from benchmarks.updates import TrainingState
from fasttrain.models import Transformer
from fasttrain.models.flops import TRAINING

BATCHES = {"dit-xl/2": 64, "vit-xl/2": 64, "vit-b/2": 128}
SWEEP = (32, 64, 128)
WARM_UP = 3
RESERVE = 40.0
"""Seconds that must be left for another arm to be built, compiled and checked: the rounds of those there are come first."""
ABLATED = {
    "dit": ("gated_adaln", "adaln", "bias_gelu", "adamw_ema", "noising", "weighted_mse", "uniform"),
    "vit": ("residual_norm", "bias_gelu", "adamw_ema", "noising", "weighted_mse", "uniform"),
    "mmdit": ("gated_adaln", "adaln", "joint_qk_norm", "bias_gelu", "adamw_ema", "noising", "weighted_mse", "uniform"),
}
"""The operations of a training step of each kind of network, those that move most bytes first."""
DIGEST_ARMS = ("ours", "compile + graphs", "compile", "eager", "ours, kernels only")
"""In the order in which they are built while there is time."""
CAPTION_ARMS = ("ours, masked", "ours, packed")
"""The two ways of attention among captions of different lengths; only a model that takes such captions has them."""
CAPTION_MODELS = {"cuda": ("mmdit-xl/2+captions", 32), "cpu": ("mmdit-tiny+captions", 8)}
"""The model and the batch that they are compared at."""
SMOKE_GEOMETRY = {"input_size": 8, "channels": 1, "num_classes": 10}


@dataclass(frozen=True)
class Effort:
    """How much is measured, and how the blocks are compiled."""

    rounds: int
    steps: int
    arms: tuple[str, ...]
    backend: str = "inductor"
    geometry: tuple[tuple[str, int], ...] = ()


class Race:
    """All arms of one model at one batch, on one training state."""

    def __init__(
        self, preset: str, batch: int, effort: Effort, device: torch.device, ceilings: dict[str, Any], remaining: Callable[[], float]
    ):
        self.preset, self.batch, self.effort, self.device, self.ceilings = preset, batch, effort, device, ceilings
        self.remaining = remaining
        self.config: Transformer = config_of(preset, **dict(effort.geometry))
        self.attention, self.attention_seconds = choose_attention(self.config, batch, device)
        torch.manual_seed(0)
        # The fast attention kernels take no fp32.
        self.truth_network: nn.Module = build_network(self.config, REFERENCE, "auto", device)
        wake(self.truth_network)
        self.state = TrainingState.of(self.truth_network)
        self.refused: dict[str, str] = {}

    def arms(self, specs: tuple[Spec, ...]) -> dict[str, StepArm]:
        """The arms that agree with the truth; why the others do not is kept in `refused`."""
        # Dynamo keeps a limited number of versions of a block's code: a race begins without those of the one before.
        torch.compiler.reset()
        self.refused = {}
        self.state.settle()
        probe = agreement.Probe.of(self.config, self.batch, self.device)
        truth = agreement.found(self.truth_network, self.state.parameters(autocast=True), probe, chunk=agreement.CHUNK)
        plain = self._found(self._built(ARMS["tuned eager"]), probe)
        able, longest = {}, 0.0
        for spec in specs:
            if self.remaining() < (max(RESERVE, longest) if spec.compiled else RESERVE):
                self.refused[spec.name] = NO_TIME
                continue
            begin = time.monotonic()
            try:
                arm = self._built(spec)
                wrong = agreement.fault(self._found(arm, probe), plain, truth, self.state.trained)
            except Exception as error:
                wrong = self._why(error)
                free_memory(self.device)
            longest = max(longest, time.monotonic() - begin)
            if wrong:
                self.refused[spec.name] = wrong
            else:
                able[spec.name] = arm
        return able

    def run(self, specs: tuple[Spec, ...], so_far: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Every arm's steps, in turns, and what they come to; the same of the rounds so far is handed to `so_far` after each."""
        arms = self.arms(specs)
        series: dict[str, list[list[float]]] = {name: [] for name in arms}
        peaks: dict[str, int] = {}
        longest = 0.0
        for _ in range(self.effort.rounds):
            if self.remaining() < 1.5 * longest:
                break
            left = self.remaining()
            for name, arm in list(arms.items()):
                try:
                    taken, peaks[name] = self._turn(arm)
                    series[name].append(taken)
                except Exception as error:
                    self.refused[name] = self._why(error)
                    del arms[name], series[name]
                    arm.end()
            longest = max(longest, left - self.remaining())
            if so_far:
                so_far(self._results(series, peaks))
        return self._results(series, peaks)

    @staticmethod
    def _why(error: Exception) -> str:
        """What to tell of an arm that failed; raises the error again where no arm can run any more."""
        if lost_device(error):
            raise error
        return described(error)[:1000]

    def _results(self, series: dict[str, list[list[float]]], peaks: dict[str, int]) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "attention": self.attention,
            "attention_seconds": self.attention_seconds,
            "parameters": self.state.parameter_count(),
            "rounds": max(map(len, series.values()), default=0),
            "flops_per_image": self.config.flops_per_image(),
            "refused": self.refused,
        }
        figures["arms"] = {name: {**self._figures(rounds), "peak_bytes": peaks[name]} for name, rounds in series.items() if rounds}
        figures["told"] = _told(figures["arms"], self.refused)
        return {**figures, **_ratios({name: rounds for name, rounds in series.items() if rounds})}

    def _built(self, spec: Spec) -> StepArm:
        effort = self.effort
        return StepArm(spec, self.config, self.state, self.batch, self.device, backend=effort.backend, attention=self.attention)

    def _found(self, arm: StepArm, probe: agreement.Probe) -> agreement.Found:
        found = agreement.found_replayed if arm.spec.graphed else agreement.found
        return found(arm.model, self.state.parameters(arm.spec.autocast), probe)

    def _turn(self, arm: StepArm) -> tuple[list[float], int]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        arm.begin()
        for _ in range(WARM_UP):
            arm.step()
        synchronize(self.device)
        taken = timed_steps(arm.step, self.effort.steps, self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        arm.end()
        return taken, peak

    def _figures(self, rounds: list[list[float]]) -> dict[str, Any]:
        seconds = spread(flat(rounds))
        rate = self.batch / seconds["median"]
        flops = TRAINING * self.config.flops_per_image() * rate
        paper = self.ceilings["matmul"]["datasheet"]
        of_paper = flops / paper if paper else None
        shares = {"mfu_measured": flops / self.ceilings["matmul"]["best"], "mfu_datasheet": of_paper}
        return {"step": {"seconds": seconds}, "images_per_second": rate, **shares}

    def look(self, name: str) -> dict[str, Any]:
        """Where an arm's time goes, and how often the host waits in it."""
        able = self.arms((ARMS[name],))
        if not able:
            return {"refused": self.refused}
        arm = able[name]
        arm.begin()
        for _ in range(WARM_UP):
            arm.step()
        found = {"profile": profiled(arm.step, self.device), "host_waits": host_waits(arm.step, self.device)}
        arm.end()
        return found


def _told(arms: dict[str, Any], refused: dict[str, str]) -> str:
    """A race in one line, since a stage may be all that is left of a short loan: times, and which arms have none and why."""
    times = [f"{name} {1e3 * found['step']['seconds']['median']:.2f} ms" for name, found in arms.items()]
    return "; ".join([*times, *(f"{name} refused: {why[:150]}" for name, why in refused.items())])


def _ratios(series: dict[str, list[list[float]]]) -> dict[str, Any]:
    """How much longer every other arm's step takes than ours, by the best of our arms, with intervals."""
    ours = [name for name in series if name.startswith("ours")]
    if not ours:
        return {}
    best = min(ours, key=lambda name: spread(flat(series[name]))["median"])
    return {"best_of_ours": best, "over_ours": {name: ratio(series[name], series[best]) for name in series if name != best}}


def run(stage: Stage, models: list[str], effort: Effort, device: torch.device, full: bool, digest: bool, batch: int | None) -> None:
    """Every part of every model, the most telling first: the races of all models before anything that explains them."""
    firsts = {preset: batch or BATCHES.get(preset, 32) for preset in models}
    ceilings = {preset: _race(stage, preset, size, effort, device) for preset, size in firsts.items()}
    if digest:
        return
    for preset, size in firsts.items():
        if "matmul" in ceilings[preset]:
            _explain(stage, preset, size, effort, device, ceilings[preset])
    for preset, first in firsts.items():
        for size in (other for other in SWEEP if full and other != first):
            _race(stage, preset, size, effort, device)
    with ExitStack() as stack:
        group = stage.case(lambda: {"told": stack.enter_context(deepspeed_step.group()) or "entered"}, part="deepspeed's processes")
        for preset, size in firsts.items() if "told" in group else ():
            stage.case(
                lambda p=preset, b=size: _through_deepspeed(p, b, effort, device), least=RESERVE, part="deepspeed", model=preset, batch=size
            )


def _race(stage: Stage, preset: str, batch: int, effort: Effort, device: torch.device) -> dict[str, Any]:
    """The device's limits at a model's shapes, which are returned, and the race of all arms."""
    keys = {"model": preset, "batch": batch}
    ceilings = stage.case(lambda: _ceilings(preset, batch, effort, device), part="limits", **keys)
    if "matmul" in ceilings:
        specs = _specs(config_of(preset, **dict(effort.geometry)), effort)
        stage.case(
            lambda: Race(preset, batch, effort, device, ceilings, stage.remaining).run(specs, stage.so_far),
            least=RESERVE,
            part="arms",
            **keys,
        )
    return ceilings


def _specs(config: Transformer, effort: Effort) -> tuple[Spec, ...]:
    """The arms that this model has."""
    return tuple(ARMS[name] for name in effort.arms if config.ragged_tokens or name not in CAPTION_ARMS)


def _through_deepspeed(preset: str, batch: int, effort: Effort, device: torch.device) -> dict[str, Any]:
    config = config_of(preset, **dict(effort.geometry))
    attention, _ = choose_attention(config, batch, device)
    return deepspeed_step.measure(config, batch, effort.rounds, effort.steps, effort.backend, attention, device)


def _explain(stage: Stage, preset: str, batch: int, effort: Effort, device: torch.device, ceilings: dict[str, Any]) -> None:
    @functools.cache
    def race() -> Race:
        return Race(preset, batch, effort, device, ceilings, stage.remaining)

    keys = {"model": preset, "batch": batch}
    for arm in ("ours", "compile + graphs", "ours, compiled", "compile"):
        stage.case(lambda arm=arm: race().look(arm), least=RESERVE, part="profile", **keys, arm=arm)
    ours = ARMS["ours, compiled" if effort.backend != "inductor" else "ours"]
    for off in ABLATED[preset.split("-")[0]]:
        stage.case(
            lambda off=off: race().run((ours, without(ours, off)), stage.so_far), least=RESERVE, part="ablation", **keys, without=off
        )


def without(spec: Spec, operation: str) -> Spec:
    """An arm with one kernel off: the reference in its place, compiled with everything around it."""
    changed = replace(spec, name=f"{spec.name} without {operation}", kernels=Kernels("auto", {operation: "reference"}))
    return replace(changed, update=ARMS["compile"].update) if operation == "adamw_ema" else changed


def _ceilings(preset: str, batch: int, effort: Effort, device: torch.device) -> dict[str, Any]:
    config = config_of(preset, **dict(effort.geometry))
    tokens = batch * config.tokens
    shapes = training_shapes(config.width, tokens) if device.type == "cuda" else [(64, 64, 64)]
    return {"copy": copy_bandwidth(device), "matmul": matmul_rate(device, shapes)}


def main() -> int:
    """Measures, and says where the result is. The exit status is 1 when a part ended in an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", help="presets; default dit-xl/2 vit-xl/2 vit-b/2")
    parser.add_argument("--batch", type=int, help="images a step; default: by model")
    parser.add_argument("--digest", action="store_true", help="the race alone, of the arms that matter, for the two largest models")
    parser.add_argument("--full", action="store_true", help="all arms at several batches")
    parser.add_argument("--captions", action="store_true", help="only attention among captions of different lengths: masked, packed")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to see that everything runs: no figure means anything")
    parser.add_argument("--seconds", type=float, default=520.0, help="the stage's limit")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>, or build/smoke")
    args = parser.parse_args()
    # On a CPU these two differ by what they compute, and not by kernels, which it does not have.
    device = timed_device(args.device, args.smoke or args.captions)
    effort = Effort(rounds=5, steps=10 if args.digest else 20, arms=DIGEST_ARMS if args.digest else tuple(ARMS))
    models = args.models or ["dit-xl/2", "vit-xl/2", "vit-b/2"][: 2 if args.digest else 3]
    if args.smoke:
        effort = Effort(2, 2, tuple(ARMS), backend="aot_eager", geometry=tuple(SMOKE_GEOMETRY.items()))
        models, args.batch = args.models or ["dit-tiny", "vit-tiny"], args.batch or 2
    if args.captions:
        (preset, size), effort = CAPTION_MODELS[device.type], Effort(rounds=5, steps=3 if device.type == "cpu" else 20, arms=CAPTION_ARMS)
        models, args.batch = args.models or [preset], args.batch or size
    out = args.out or (Path("build/smoke") if args.smoke else results_folder(device))
    settings = {"precision": "bf16 weights, fp32 masters", "rounds": effort.rounds, "steps": effort.steps, "digest": args.digest}
    settings |= {"smoke": args.smoke, "kernels": here(), "backend": effort.backend}
    settings["arms"] = {name: ARMS[name].means for name in effort.arms}
    name = "captions" if args.captions else "step"
    stage = Stage(out / f"{name}.json", name, environment(device), settings, args.seconds)
    run(stage, models, effort, device, args.full, args.digest or args.captions, args.batch)
    stage.note(environment_after=environment(device))
    (out / f"{name}.svg").write_text(step_bars(stage.result))
    print(f"written: {stage.path}")
    return 1 if stage.failed() else 0


if __name__ == "__main__":
    raise SystemExit(main())
