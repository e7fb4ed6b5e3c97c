"""`fasttrain analyse interpolate RUN`: the loss along the straight line between two checkpoints, or between two runs."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fasttrain.charts import Line, Panel, line_chart
from fasttrain.commands.analyses.landscape import HELD_OUT, TRAINING, add_landscape_arguments, fixed_losses, looked_at, told
from fasttrain.commands.analyses.measuring import TIMEOUT_SECONDS
from fasttrain.commands.analyses.output import folder_of, write
from fasttrain.commands.analyses.ranges import labels
from fasttrain.commands.generating import loaded, refuse_untrained, tell_passed_over
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.fixed_loss import FixedLoss
from fasttrain.research.interpolation import Profile, between, places
from fasttrain.run import identity
from fasttrain.trained import UNTRAINED, Trained

Weights = dict[str, Tensor]


class Ends(NamedTuple):
    """The two networks, and their names."""

    first: Trained
    second: Trained
    names: tuple[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_landscape_arguments(parser)
    parser.add_argument("--from", dest="start", metavar="STEP", help="a kept checkpoint, or `untrained` (default), at a = 0")
    parser.add_argument("--to", dest="end", metavar="STEP", help="a kept checkpoint at a = 1 (default: the newest)")
    parser.add_argument("--other", type=Path, metavar="RUN", help="a = 1 is this run's newest checkpoint, and a = 0 that of RUN")
    parser.add_argument("--points", type=int, default=21, help="on the line from 0 to 1; a quarter more on either side (default 21)")


def run(args: argparse.Namespace) -> None:
    if not 2 <= args.points <= 10_001:
        raise UserError(f"--points must lie between 2 and 10001, got {args.points}")
    refuse_untrained([args.weights], "give --from untrained instead, and with --weights what it is compared with")
    with distributed.joined(TIMEOUT_SECONDS) as processes:
        ends = _ends(args, processes)
        if processes.is_main:
            for end in ends[:2]:
                tell_passed_over(end)
        config = ends.first.config
        images = [TRAINING, *([HELD_OUT] if config.data.held_out else [])]
        weights = weights_of(ends.first.network), weights_of(ends.second.network)
        with fixed_losses(args, config, processes, images) as losses:
            profiles = profiles_of(ends.first.network, weights, losses, places(args.points))
        if processes.is_main:
            result = {**told(args, config, processes), **_described(ends, weights, profiles)}
            _tell(result)
            write(folder_of(args, args.run), "interpolate", result, lambda path: _draw(path, result))


def profiles_of(network: nn.Module, ends: tuple[Weights, Weights], losses: dict[str, FixedLoss], at: list[float]) -> dict[str, Profile]:
    """The losses at these places between two sets of weights, by kind of images. A collective; changes the network's weights."""
    rows: dict[str, list[float]] = {kind: [] for kind in losses}
    for a in at:
        network.load_state_dict(between(*ends, a), strict=False)  # the loss knows nothing of the others
        for kind, loss in losses.items():
            rows[kind].append(loss.mean(network))
    return {kind: Profile(at, row) for kind, row in rows.items()}


def weights_of(network: nn.Module) -> Weights:
    """A copy of what the loss is a function of."""
    return {name: parameter.detach().clone() for name, parameter in looked_at(network).items()}


def _ends(args: argparse.Namespace, processes: Processes) -> Ends:
    if args.other is None:
        start, end = _end(args, args.start or UNTRAINED, processes), _end(args, args.end, processes)
        if start.step == end.step:
            raise UserError(f"--from and --to are both step {end.step}: there is no line between them")
        return Ends(start, end, (_name(start), _name(end)))
    if args.start is not None or args.end is not None:
        raise UserError("--other compares the newest checkpoints of two runs: leave out --from and --to")
    names = labels([args.run, args.other])
    found = [loaded(place, args.weights, processes, None) for place in (args.run, args.other)]
    _check_same_network(*found)
    return Ends(found[0], found[1], (f"{names[0]}, {_name(found[0])}", f"{names[1]}, {_name(found[1])}"))


def _end(args: argparse.Namespace, step: str | None, processes: Processes) -> Trained:
    """The run's weights at `untrained`, at a step's number, or (None) the newest. A collective."""
    if step == UNTRAINED:
        return loaded(args.run, UNTRAINED, processes, None)
    if step is not None and not (step.isascii() and step.isdigit()):
        raise UserError(f"--from, --to {step}: give the step of a kept checkpoint, or {UNTRAINED}")
    return loaded(args.run, args.weights, processes, None if step is None else int(step))


def _check_same_network(first: Trained, second: Trained) -> None:
    """Between networks of other shapes, or of other targets, there is no line that means anything."""
    one, other = (identity(trained.config, trained.index) for trained in (first, second))
    for key in ("model", "diffusion.schedule", "diffusion.prediction", "diffusion.uncertainty"):
        if one.get(key) != other.get(key):
            raise UserError(f"--other: {key} of {second.config.run_dir} is not that of {first.config.run_dir}: choose runs that share it")


def _name(trained: Trained) -> str:
    return UNTRAINED if trained.weights == UNTRAINED else f"step {trained.step}"


def _described(ends: Ends, weights: tuple[Weights, Weights], profiles: dict[str, Profile]) -> dict[str, Any]:
    return {
        "from": ends.names[0],
        "to": ends.names[1],
        "weights": [ends.first.weights, ends.second.weights],
        "parameters": sum(tensor.numel() for tensor in weights[0].values()),
        "lengths": [_length(of.values()) for of in weights],
        "distance": _length(other - weights[0][name] for name, other in weights[1].items()),
        "profiles": {
            kind: {"at": list(of.at), "loss": list(of.losses), "barrier": of.barrier, "lowest_at": of.lowest}
            for kind, of in profiles.items()
        },
    }


def _length(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def _tell(result: dict[str, Any]) -> None:
    print(f"from {result['from']} (a = 0) to {result['to']} (a = 1), {result['samples']} fixed samples")
    for kind, profile in result["profiles"].items():
        loss = dict(zip(profile["at"], profile["loss"], strict=True))
        ends = f"loss {loss[0.0]:.4g} at 0, {loss[1.0]:.4g} at 1"
        print(f"{kind:>9}: {ends}, barrier {profile['barrier']:.4g}, lowest at a = {profile['lowest_at']:.3g}")


def _draw(path: Path, result: dict[str, Any]) -> None:
    lines = [Line(kind, list(zip(of["at"], of["loss"], strict=True))) for kind, of in result["profiles"].items()]
    title = f"{result['run']}: the loss from {result['from']} to {result['to']}"
    axis = "a, of (1 - a) A + a B"
    line_chart(path, title, [Panel("weighted loss", lines, axis), Panel("the same, logarithmic", lines, axis, log_y=True)])
