"""`fasttrain analyse hessian RUN`: the spectrum of the training loss's Hessian, by Lanczos' method on products by double backward.

Fused kernels and torch's fast attention cannot be differentiated twice: the network and the loss are computed by the plain references,
which the kernels are tested against.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels.dispatch import Kernels
from torch import nn

from fasttrain.building import build_network
from fasttrain.charts import Line, Panel, line_chart
from fasttrain.commands.analyses.landscape import HELD_OUT, TRAINING, add_landscape_arguments, fixed_losses, looked_at, told
from fasttrain.commands.analyses.measuring import GIB, TIMEOUT_SECONDS
from fasttrain.commands.analyses.output import folder_of, write
from fasttrain.commands.generating import check_steps, loaded, tell_passed_over
from fasttrain.config import RunConfig
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.research.hessian import Hessian, random_signs
from fasttrain.research.lanczos import Spectrum, asymmetry, checked, density, lanczos, squared_trace, trace
from fasttrain.trained import Trained

PLACES = 400  # of the density's curve
SHOWN = 0.1  # of what a single eigenvalue's curve reaches: what lies below is nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_landscape_arguments(parser)
    parser.add_argument("--checkpoint-step", type=int, metavar="N", help="a kept checkpoint (default: the newest)")
    parser.add_argument("--images", default=TRAINING, choices=(TRAINING, HELD_OUT), help="which images (default training)")
    parser.add_argument("--steps", type=int, default=60, help="Lanczos steps from each random vector: a product each (default 60)")
    parser.add_argument("--vectors", type=int, default=4, help="random vectors, for the density and the trace (default 4)")
    parser.add_argument("--top", type=int, default=5, help="eigenvalues told at either end (default 5)")
    parser.add_argument("--width", type=float, default=0.01, help="of the density's curves, as a share of the spectrum (default 0.01)")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for Lanczos' vectors (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the random vectors")


def run(args: argparse.Namespace) -> None:
    _check(args)
    with distributed.joined(TIMEOUT_SECONDS) as processes:
        trained = loaded(args.run, args.weights, processes, args.checkpoint_step)
        config = plain(trained.config)
        network = twice_differentiable(trained, config)
        parameters = list(looked_at(network).values())
        _check_memory(args, sum(parameter.numel() for parameter in parameters))
        if processes.is_main:
            tell_passed_over(trained)
            print("computed by the reference implementations and attention math, which can be differentiated twice", flush=True)
        with fixed_losses(args, config, processes, [args.images]) as losses:
            (loss,) = losses.values()
            product = Hessian(parameters, lambda: loss.minimised(network), processes.sum)
            found = measured(product, args, processes) | {"loss_value": loss.mean(network)}
        if processes.is_main:
            result = {
                **told(args, trained.config, processes),
                "images": args.images,
                "weights": trained.weights,
                "checkpoint_step": trained.step,
                "implementations": "reference, attention math, fp32",
                **found,
            }
            _tell(result)
            write(folder_of(args, args.run), "hessian", result, lambda path: _draw(path, result))


def plain(config: RunConfig) -> RunConfig:
    """The same run computed by what can be differentiated twice."""
    model = dataclasses.replace(config.model, checkpoint_blocks=False)
    return config.model_copy(update={"kernels": Kernels("reference"), "model": model})


def twice_differentiable(trained: Trained, config: RunConfig) -> nn.Module:
    """The trained network, built anew from a `plain` config."""
    network = build_network(config, attention="math")
    network.load_state_dict(trained.network.state_dict())
    return network.to(next(trained.network.parameters()).device).eval()


def measured(product: Hessian, args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The spectrum as plain data. A collective.

    Raises:
        UserError: the loss has no finite second derivatives there.
    """
    signs = [random_signs(product.size, args.seed + number, torch.float32, processes.device) for number in range(args.vectors)]
    spectra = []
    try:
        for number, start in enumerate(signs):
            spectra.append(lanczos(product, start, args.steps))
            if processes.is_main:
                print(f"vector {number + 1} of {args.vectors}: {_ends(spectra[-1])}", flush=True)
    except ValueError as error:
        raise UserError(f"the loss has no finite second derivatives at these weights ({error}): choose another checkpoint") from None
    size, first = product.size, spectra[0]
    mean, spread = _moments(spectra, size)
    return {
        "parameters": size,
        "lanczos_steps": [len(spectrum.nodes) for spectrum in spectra],
        **_extremes(product, first, args.top),
        "trace": trace(spectra, size)._asdict(),
        "squared_trace": squared_trace(spectra, size)._asdict(),
        "mean_eigenvalue": mean,
        "spread": spread,
        "negative_share": sum(float(s.weights[s.nodes + s.bounds < 0].sum()) for s in spectra) / len(spectra),
        "asymmetry": asymmetry(product, signs[0], signs[-1].roll(1)),
        "quadrature": [{"nodes": spectrum.nodes.tolist(), "weights": spectrum.weights.tolist()} for spectrum in spectra],
        "density": _curve(spectra, args.width, size),
    }


def _extremes(product: Hessian, spectrum: Spectrum, top: int) -> dict[str, Any]:
    """The outermost eigenvalues. Lanczos' own bounds know nothing of rounding: what a product more finds beyond them is added to all."""
    found = {"highest": spectrum.highest(top), "lowest": spectrum.lowest(top)}
    again = {"highest": checked(product, spectrum.vectors[1]), "lowest": checked(product, spectrum.vectors[0])}
    rounding = max(0.0, *(again[end].bound - values[0].bound for end, values in found.items()))
    told = {end: [{"value": ritz.value, "bound": ritz.bound + rounding} for ritz in values] for end, values in found.items()}
    return {**told, **{f"{end}_checked": ritz._asdict() for end, ritz in again.items()}, "rounding": rounding}


def _moments(spectra: list[Spectrum], size: int) -> tuple[float, float]:
    """The eigenvalues' mean and standard deviation."""
    mean = trace(spectra, size).value / size
    return mean, max(squared_trace(spectra, size).value / size - mean**2, 0.0) ** 0.5


def _curve(spectra: list[Spectrum], share: float, size: int) -> dict[str, Any]:
    """The density on a grid; null where it is less than anything could be."""
    low, high = (float(pick(torch.cat([s.nodes for s in spectra]))) for pick in (torch.min, torch.max))
    width = share * (high - low) or 1.0
    at = torch.linspace(low - 4 * width, high + 4 * width, PLACES, dtype=torch.float64)
    values = density(spectra, at, width)
    least = SHOWN / (size * width * (2 * torch.pi) ** 0.5)
    return {"width": width, "at": at.tolist(), "density": [value if value >= least else None for value in values.tolist()]}


def _check(args: argparse.Namespace) -> None:
    check_steps("--checkpoint-step", [args.weights], [] if args.checkpoint_step is None else [args.checkpoint_step])
    for option in ("steps", "vectors", "top"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} must be positive, got {getattr(args, option)}")
    for option in ("width", "memory"):
        if not 0 < getattr(args, option) < float("inf"):
            raise UserError(f"--{option} must be positive, got {getattr(args, option)}")
    if not 0 <= args.seed < 2**62:
        raise UserError(f"--seed must lie in [0, 2^62), got {args.seed}")


def _check_memory(args: argparse.Namespace, size: int) -> None:
    """Lanczos keeps a vector of the network's size for each step, in fp32, and each random vector."""
    needed = (min(args.steps, size) + args.vectors) * size * 4 / GIB
    if needed > args.memory:
        told = f"{args.steps} Lanczos steps on {size:,} parameters keep {needed:.1f} GiB of vectors"
        raise UserError(f"{told}, more than --memory {args.memory:g}: take fewer --steps, or allow more --memory")


def _ends(spectrum: Spectrum) -> str:
    low, high = spectrum.lowest(1)[0], spectrum.highest(1)[0]
    return f"eigenvalues from {low.value:.4g} to {high.value:.4g}"


def _tell(result: dict[str, Any]) -> None:
    on = f"{result['samples']} fixed samples, {result['parameters']:,} parameters"
    print(f"{result['weights']} weights at step {result['checkpoint_step']}, {on}")
    for end in ("highest", "lowest"):
        found = ", ".join(f"{ritz['value']:.4g} +- {ritz['bound']:.1g}" for ritz in result[end])
        again = result[f"{end}_checked"]
        print(f"{end:>8} eigenvalues: {found}; by one more product {again['value']:.4g} +- {again['bound']:.1g}")
    total, mean, spread = result["trace"], result["mean_eigenvalue"], result["spread"]
    print(f"trace {total['value']:.4g} +- {total['error']:.2g}; asymmetry of products {result['asymmetry']:.1g}")
    print(f"all eigenvalues: mean {mean:.4g}, standard deviation {spread:.3g}, {result['negative_share']:.1%} of them surely below 0")


def _draw(path: Path, result: dict[str, Any]) -> None:
    curve = result["density"]
    points = [(x, float("nan") if y is None else y) for x, y in zip(curve["at"], curve["density"], strict=True)]
    high, low = result["highest"][0]["value"], result["lowest"][0]["value"]
    title = f"{result['run']}, step {result['checkpoint_step']}: spectrum of the Hessian, {low:.3g} to {high:.3g}"
    line_chart(path, title, [Panel("density (share of eigenvalues per unit)", [Line("density", points)], "eigenvalue", log_y=True)])
