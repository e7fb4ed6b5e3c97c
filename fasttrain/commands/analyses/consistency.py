"""`fasttrain analyse consistency RUN RUN ...`: how alike the images of several models are that begin with the same noise.

Models of other seeds, sizes or families, or checkpoints of one run; the control is what other noise of the same conditions gives.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.charts import Heat, heat_chart
from fasttrain.commands.analyses.output import add_output_argument, folder_of, write
from fasttrain.commands.analyses.ranges import labels
from fasttrain.commands.generating import (
    TIMEOUT_SECONDS,
    Drawing,
    add_generation_arguments,
    check_steps,
    draw,
    loaded,
    sampler_of,
    tell_caution,
    wishes_of,
)
from fasttrain.cond import Cond
from fasttrain.diffusion.prediction import Prediction
from fasttrain.diffusion.schedule import Schedule
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.registry import shown
from fasttrain.research.consistency import MOST_DB, Images, Pair, matrix
from fasttrain.sampling import Sampler
from fasttrain.sampling.images import save_grid
from fasttrain.trained import Trained

SHOWN = 12  # samples of each model in the picture


class Kind(NamedTuple):
    """What models must share for their images to be comparable, as told in a refusal."""

    noise: tuple[int, int, int]  # [C, H, W] that sampling begins with
    image: tuple[int, int, int]  # [H, W, C]
    classes: tuple[str, ...]
    asked: dict[str, Any]
    vae: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser, count=100, several=True)
    parser.add_argument("--weights", default="ema", help="ema, ema_1 ..., raw, or untrained (default ema)")
    parser.add_argument(
        "--checkpoint-steps", type=int, nargs="+", metavar="STEP", help="kept checkpoints, each of every run (default: the newest)"
    )
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw, taken in turn (default: all)")
    add_output_argument(parser)


def run(args: argparse.Namespace) -> None:
    check_steps("--checkpoint-steps", [args.weights], args.checkpoint_steps or [])
    steps: list[int | None] = list(dict.fromkeys(args.checkpoint_steps or [None]))
    models = [(name, folder, step) for name, folder in zip(labels(args.run), args.run, strict=True) for step in steps]
    if len(models) < 2:
        raise UserError("one model alone is consistent with nothing: give a second run, or several --checkpoint-steps")
    with distributed.joined(TIMEOUT_SECONDS) as processes:
        tell_caution(args, processes)
        kinds: list[Kind] = []
        images: list[Images] = []
        for _, folder, step in models:
            trained = loaded(folder, args.weights, processes, step)
            drawing, period = _drawing(trained, args, processes)
            kinds.append(_kind(trained, drawing))
            _check_comparable(args.run[0], kinds[0], folder, kinds[-1])
            images.append(_all(drawing, processes))
        if processes.is_main:
            names = [name if step is None else f"{name} {step}" for name, _, step in models]
            result = _result(args, names, matrix(images, period))
            _tell(result)
            write(folder_of(args, args.run[0]), "consistency", result, lambda path: _draw(path, result, images))


def is_random(sampler: Sampler, schedule: Schedule, prediction: Prediction) -> bool:
    """Whether a sampler asks for noise after what it starts from: tried on a sample of one number."""
    asked: set[int] = set()

    def noise(draw: int) -> Tensor:
        asked.add(draw)
        return torch.zeros(1, 1, 1, 1)

    sampler(lambda x, t, cond: torch.zeros_like(x), schedule, prediction, noise, Cond(), torch.float32)
    return asked != {0}


def _drawing(trained: Trained, args: argparse.Namespace, processes: Processes) -> tuple[Drawing, int]:
    """A model's samples to be made, and after how many numbers their conditions come again. A collective.

    Raises:
        UserError: a random sampler, or a count that leaves no control.
    """
    diffusion, sampler = trained.config.diffusion, sampler_of(args)
    sampler.require()
    if is_random(sampler, diffusion.schedule, diffusion.prediction):
        raise UserError(
            f"--sampler {args.sampler[0]} adds noise on its way, which would count as the models' difference: "
            "take one that adds none, as heun, euler, dpm_solver or ddim with eta=0"
        )
    drawing = draw(trained, args, processes, wishes_of(args, args.labels))
    asked = drawing.asked
    period, of = (len(asked.labels), "classes") if asked.prompts is None else (len(asked.captions), "prompts")
    if args.count % period or args.count < 2 * period:
        raise UserError(
            f"--count {args.count}: other noise of the same conditions is the control, and {period} {of} take turns: give a multiple of "
            f"{period}, at least {2 * period}, or ask for fewer {of}"
        )
    return drawing, period


def _kind(trained: Trained, drawing: Drawing) -> Kind:
    channels, side, num_classes = trained.config.model.geometry()
    return Kind(
        noise=(channels, side, side),
        image=drawing.shape,
        classes=trained.index.classes if num_classes else (),
        asked=drawing.asked.described(),
        vae=None if drawing.vae is None else drawing.vae.id,
    )


def _check_comparable(first: Path, wanted: Kind, folder: Path, found: Kind) -> None:
    """Raises UserError where the noise or what is asked for means another thing to one of the models."""
    for what, mine, other in zip(("noise", "images", "classes", "conditions", "VAE"), found, wanted, strict=True):
        if mine != other:
            raise UserError(
                f"{folder}: {what} {shown(mine)} are not those of {first}, {shown(other)}: compare models of one kind of images"
            )


def _all(drawing: Drawing, processes: Processes) -> Images:
    """All samples in the order of their numbers, on rank 0; none elsewhere. A collective."""
    parts = [part for share in processes.gather_to_main(list(drawing.batches)) for part in share]
    if not parts:
        return np.zeros((0, *drawing.shape), np.uint8)
    order = np.argsort(np.concatenate([part.numbers for part in parts]))
    return np.concatenate([part.images for part in parts])[order]


def _result(args: argparse.Namespace, names: list[str], pairs: list[list[Pair]]) -> dict[str, Any]:
    """Everything as plain data; `mean` and `control_mean` are over all pairs of two models."""
    others = [pairs[i][j] for i in range(len(names)) for j in range(i)]
    return {
        "models": names,
        "weights": args.weights,
        "metric": "PSNR = 10 log10(1 / MSE) in dB, per pair of images of 8 bits in [0, 1]; mean over samples and its standard error",
        "most": MOST_DB,
        "control_is": "the same classes or prompts, other noise",
        "samples": args.count,
        "seed": args.seed,
        "sampler": " ".join(args.sampler),
        "steps": sampler_of(args).steps,
        "guidance": args.guidance,
        "mean": float(np.mean([pair.same.value for pair in others])),
        "control_mean": float(np.mean([pair.control.value for pair in others])),
        **{part: [[getattr(pair, part)._asdict() for pair in row] for row in pairs] for part in Pair._fields},
    }


def _tell(result: dict[str, Any]) -> None:
    names = result["models"]
    print(f"PSNR of {result['samples']} images from the same noise, in dB +- two standard errors (control: other noise, same conditions)")
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            same, control, gain = (_told(result[part][i][j]) for part in Pair._fields)
            print(f"{first} and {names[j]}: {same} (control {control}; {gain} more)")
    print(f"all pairs: {result['mean']:.2f}, control {result['control_mean']:.2f}")


def _told(mean: dict[str, float]) -> str:
    return f"{mean['value']:.2f} +- {2 * mean['error']:.2f}"


def _draw(path: Path, result: dict[str, Any], images: list[Images]) -> None:
    names = result["models"]
    titles = {
        "same": "PSNR in dB, from the same noise",
        "control": "from other noise (control)",
        "gain": "how much more the same noise gives",
    }
    heats = []
    for part, title in titles.items():
        values = [[mean["value"] for mean in row] for row in result[part]]
        blank = [[math.nan if i == j and part != "control" else value for j, value in enumerate(row)] for i, row in enumerate(values)]
        heats.append(Heat(title, blank, names, names, from_least=part != "gain"))
    heat_chart(path, f"Consistency: {result['samples']} images, {result['sampler']}", heats)
    columns = min(SHOWN, result["samples"])
    strip = np.concatenate([made[:columns] for made in images])  # a row for each model, in the order of `models`
    save_grid(path.with_name(f"{path.stem}-samples.png"), strip, columns=columns)
