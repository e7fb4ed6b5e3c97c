"""What `fasttrain sample` and `evaluate` have in common: the arguments that decide samples, and the making of them."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from fasttrain.data.index import VaeRecord
from fasttrain.engine.distributed import Processes
from fasttrain.engine.together import on_main, together
from fasttrain.errors import UserError
from fasttrain.generation import Wishes
from fasttrain.plain_yaml import read_yaml
from fasttrain.registry import shown
from fasttrain.sampling import SAMPLERS, Sampler
from fasttrain.sampling.asked import Asked
from fasttrain.sampling.generate import Samples
from fasttrain.sampling.guidance import Guidance, read_guidance
from fasttrain.sampling.images import to_uint8
from fasttrain.trained import UNTRAINED, Trained

TIMEOUT_SECONDS = 3600.0


class Made(NamedTuple):
    """Samples as images."""

    numbers: NDArray[np.int64]  # [n]
    labels: NDArray[np.int64] | None  # [n]; None where the model is told no classes
    images: NDArray[np.uint8]  # [n, H, W, C]


class Drawing(NamedTuple):
    """Samples to be made, what they are asked to show, and what makes images of them."""

    asked: Asked
    shape: tuple[int, int, int]  # (H, W, C) of an image
    vae: VaeRecord | None  # that decodes them; None for pixels
    batches: Iterator[Made]  # of this rank, in increasing order of number


def add_generation_arguments(parser: argparse.ArgumentParser, count: int, several: bool = False) -> None:
    """Run, or `several`, sampler, guidance and what is asked of the samples."""
    parser.add_argument("run", type=Path, nargs="+" if several else None, help=f"run folder{'s' if several else ''} of `fasttrain train`")
    parser.add_argument("--count", type=int, default=count, help=f"how many samples (default {count})")
    parser.add_argument("--batch", type=int, default=128, help="samples made at once by a process (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples: sample i is a function of it and i")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what a text model is to show; several take turns (default: the run's own)"
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="the same, one a line")
    parser.add_argument(
        "--text-encoder", metavar="PLACE", help="folder or hub id of the run's text encoder, for other prompts than the run's own"
    )
    parser.add_argument("--text-encoder-revision", metavar="COMMIT", help="of a hub id")
    parser.add_argument(
        "--control",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=NUMBERS",
        help="what the model is told of an image's making, as in `size=512,512 crop=0,0 flip=0 aspect=0` (100 log2(width / height))",
    )
    parser.add_argument("--vae", help="hub id or folder that decodes latents (default: the run's data.vae)")
    parser.add_argument("--vae-revision", metavar="COMMIT", help="of a hub id (default: that of the set's own)")
    parser.add_argument(
        "--sampler",
        nargs="+",
        default=["heun"],
        metavar=("NAME", "KEY=VALUE"),
        help=f"one of {', '.join(SAMPLERS.names())}, and its parameters, as in `ddim eta=0.5` (default heun)",
    )
    parser.add_argument("--steps", type=int, help="steps N: 2N - 1 evaluations of the model for heun, N for the others (default: its own)")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of classifier-free guidance (default 1: none)")
    parser.add_argument("--control-guidance", type=float, default=1.0, help="scale of guidance by the controls (default 1: none)")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FIRST", "LAST"), help="fractions of T with guidance"
    )
    parser.add_argument(
        "--guidance-resolution", type=float, default=1.0, help="images this many times larger than --guidance was found for (default 1)"
    )


def sampler_of(args: argparse.Namespace) -> Sampler:
    """The sampler that is asked for.

    Raises:
        UserError: an unknown name or parameter, or a value that cannot be.
    """
    name, *pairs = args.sampler
    params: dict[str, Any] = {"name": name}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--sampler {name} {shown(pair)}: parameters read key=value, as in `--sampler ddim eta=0.5`")
        if key in params or (key == "steps" and args.steps is not None):
            raise UserError(f"--sampler {name} {shown(pair)}: {key} is given twice; give it once")
        params[key] = _value(pair, value)
    if args.steps is not None:
        params["steps"] = args.steps
    try:
        return SAMPLERS.build(params)
    except ValueError as error:
        raise UserError(f"--sampler, --steps: {error}") from None


def tell_caution(args: argparse.Namespace, processes: Processes) -> None:
    """One line, once, where the sampler that is asked for has one to say."""
    if processes.is_main and (told := sampler_of(args).caution()):
        print(told)


def guidance_of(args: argparse.Namespace) -> Guidance:
    """The guidance that is asked for. Raises UserError for values that cannot be, or that change nothing."""
    asked: Mapping[str, Any] = {
        "scale": args.guidance,
        "controls": args.control_guidance,
        "interval": list(args.guidance_interval),
        "resolution": args.guidance_resolution,
    }
    try:
        guidance = read_guidance(asked)
    except ValueError as error:
        raise UserError(f"--guidance, --control-guidance, --guidance-interval, --guidance-resolution: {error}") from None
    _check_leads(guidance)
    return guidance


def _check_leads(guidance: Guidance) -> None:
    """Raises UserError where a number is given that has nothing to act on."""
    if guidance.resolution != 1 and guidance.scale == 1:
        raise UserError("--guidance-resolution: it multiplies --guidance, which is 1 (none): give --guidance too, or leave it out")
    if guidance.interval != (0, 1) and guidance.scale == guidance.controls == 1:
        raise UserError("--guidance-interval: there is no guidance to limit: give --guidance or --control-guidance too, or leave it out")
    if guidance.controls != 1 and guidance.strength == 0:
        at = f"--guidance {guidance.scale:g}{f' and --guidance-resolution {guidance.resolution:g}' if guidance.scale else ''}"
        raise UserError(f"--control-guidance: at {at} the model is told no conditions, which could lead it: give another, or leave it out")


def wishes_of(args: argparse.Namespace, labels: list[int] | None = None) -> Wishes:
    """What is asked of the samples.

    Raises:
        UserError: a file that cannot be read or holds nothing, or controls that are no numbers.
    """
    prompts = args.prompt if args.prompts is None else _lines(args.prompts)
    controls: dict[str, tuple[float, ...]] = {}
    for name, numbers in map(_control, args.control):
        if name in controls:
            raise UserError(f"--control {shown(name)}: given twice; give it once")
        controls[name] = numbers
    return Wishes(labels, prompts, args.text_encoder, args.text_encoder_revision, controls)


def check_steps(option: str, weights: Sequence[str], steps: Sequence[object]) -> None:
    """Raises UserError where steps are given that nothing has: a network before its first step alone."""
    if steps:
        refuse_untrained(weights, f"leave it out, or {option}")


def refuse_untrained(weights: Sequence[str], why: str) -> None:
    """Raises UserError where nothing but a network before its first step is asked for, which cannot be meant; `why` says what to do."""
    if set(weights) == {UNTRAINED}:
        raise UserError(f"--weights {UNTRAINED} is the network before its first step, of no checkpoint: {why}")


def loaded(run_dir: Path, weights: str, processes: Processes, step: int | None) -> Trained:
    """The same weights on every rank: where no step is given, rank 0 chooses the newest sound checkpoint for all. A collective.

    Raises:
        UserError: see `Trained.load`; what one rank meets ends all.
    """
    chosen = on_main(processes, lambda: Trained.load(run_dir, weights, processes.device, step))
    found = processes.from_main(chosen and chosen.step)
    return together(processes, lambda: chosen or Trained.load(run_dir, weights, processes.device, found))


def draw(trained: Trained, args: argparse.Namespace, processes: Processes, wishes: Wishes) -> Drawing:
    """This rank's share of the samples that are asked for, made a batch at a time while they are taken. A collective.

    Raises:
        UserError: what is asked for cannot be.
    """
    generator = trained.generator(sampler_of(args), guidance_of(args), args.seed, wishes)
    decode = trained.decoder(args.vae, args.vae_revision)
    channels, side, classes = trained.config.model.geometry()
    classes = 0 if generator.conditions.prompts is not None else classes
    if processes.is_main:
        tell_passed_over(trained)

    def batches() -> Iterator[Made]:
        with Progress(disable=not processes.is_main) as progress:
            task = progress.add_task(f"sampling with {trained.weights} weights of step {trained.step}", total=args.count)
            for samples in generator.generate(
                args.count,
                args.batch,
                rank=processes.rank,
                world_size=processes.world_size,
                progress=lambda n: progress.advance(task, n * processes.world_size),
            ):
                yield Made(samples.number.numpy(), _labels(samples) if classes else None, to_uint8(decode(samples.x0)))

    vae = decode.latents[0].record if decode.latents else None
    return Drawing(generator.conditions, decode.image_shape(channels, side), vae, batches())


def _labels(samples: Samples) -> NDArray[np.int64]:
    assert samples.cond.labels is not None
    return samples.cond.labels.cpu().numpy()


def tell_passed_over(trained: Trained) -> None:
    """One line for each damaged checkpoint newer than the one used."""
    for damaged in trained.passed_over:
        print(f"passed over a damaged checkpoint: {damaged}")


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read as text in UTF-8: {error}") from None
    if not lines:
        raise UserError(f"--prompts {path}: holds no prompt; write one a line")
    return lines


def _control(given: str) -> tuple[str, tuple[float, ...]]:
    name, _, numbers = given.partition("=")
    try:
        told = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        told = ()
    if not told or not all(map(math.isfinite, told)):
        raise UserError(f"--control {shown(given)}: give a name and its numbers, as in size=512,512 or flip=0")
    return name, told


def _value(pair: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError as error:
        raise UserError(f"--sampler {shown(pair)}: the value is not YAML: {error}") from None
