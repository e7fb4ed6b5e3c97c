"""`fasttrain analyse gradients RUN`: how the gradients of timestep ranges agree and conflict, and how noisy they are."""

import argparse
from pathlib import Path
from typing import Any

from fasttrain.charts import Heat, heat_chart
from fasttrain.commands.analyses.measuring import (
    TIMEOUT_SECONDS,
    add_gradient_arguments,
    add_measuring_arguments,
    draws_of,
    measure_gradients,
    subject,
)
from fasttrain.commands.analyses.output import folder_of, write
from fasttrain.engine import distributed
from fasttrain.research.gradients import RangeGradients


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring_arguments(parser)
    add_gradient_arguments(parser)


def run(args: argparse.Namespace) -> None:
    with distributed.joined(TIMEOUT_SECONDS) as processes, subject(args, processes, args.checkpoint_step) as on:
        found = measure_gradients(on, draws_of(args), args.memory)
        if processes.is_main:
            result = {**on.told(args), **described(found)}
            _tell(result)
            write(folder_of(args, args.run), "gradients", result, lambda path: _draw(path, result))


def described(found: RangeGradients) -> dict[str, Any]:
    """The estimate as plain data."""
    return {
        "loss": found.losses.mean(dim=0).tolist(),
        "gram": found.gram.tolist(),
        "cosines": found.cosines.tolist(),
        "signal_cosines": found.signal_cosines.tolist(),
        "half_cosines": found.half_cosines.tolist(),
        "noise_shares": found.noise_shares.tolist(),
    }


def _tell(result: dict[str, Any]) -> None:
    names, cosines = result["names"], result["cosines"]
    print(f"{result['weights']} weights at step {result['checkpoint_step']}, {result['samples_per_range']} samples a range")
    print(f"{'timesteps':>12} {'x0 loss':>10} {'|gradient|':>11} {'noise in |g|^2':>15} {'conflicts with':>15}")
    for k, name in enumerate(names):
        against = sum(cosine < 0 for cosine in cosines[k])
        length = result["gram"][k][k] ** 0.5
        print(f"{name:>12} {result['loss'][k]:>10.4g} {length:>11.4g} {result['noise_shares'][k]:>14.1%} {against:>15}")


def _draw(path: Path, result: dict[str, Any]) -> None:
    names = result["names"]
    heats = [
        Heat("cosine between ranges' gradients (below 0: conflict)", result["cosines"], names, names),
        Heat("the same without the noise in their lengths (white: noise hides the signal)", result["signal_cosines"], names, names),
    ]
    heat_chart(path, f"{result['run']}, step {result['checkpoint_step']}: do timesteps agree?", heats)
