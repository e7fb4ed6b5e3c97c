"""What a user should know of a source beside what becomes of its weights: where this run computes something else with them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fasttrain.interchange.fitting import Fitting
from fasttrain.models.layers import NORM_EPS
from fasttrain.registry import shown

EXPLAINED = frozenset(
    {"name", "input_size", "channels", "num_classes", "patch", "learn_sigma", "conditioning", "controls", "num_timesteps", "position_base"}
    | {"text_tokens", "text_width", "text_pooled", "checkpoint_blocks"}
)
"""Fields of a model whose difference changes no computation, or is told by rows of the plan, or by other notes."""

OF_RESOLUTION = {"name", "rescale", "shift"}
"""Parameters of a schedule that are told with the resolution; its name is told alone."""

ALWAYS = {"frequency_shift": 0, "norm_eps": NORM_EPS}
"""What models compute with that have no such field."""


def notes(fitting: Fitting) -> Iterator[str]:
    """A line each."""
    yield from _of_model(fitting)
    yield from _of_resolution(fitting)
    yield from _of_diffusion(fitting)
    yield from _of_data(fitting)


def _of_model(fitting: Fitting) -> Iterator[str]:
    theirs, ours = fitting.source.model, fitting.model
    for key in ours:
        if key not in EXPLAINED and fitting.differs(key):
            was, now = shown(theirs[key]), shown(ours[key])
            yield f"model.{key} is {was} there and {now} here, so the network computes something else; model.{key}={was} would keep it"
    for key, fixed in ALWAYS.items():
        if key not in ours and theirs.get(key, fixed) != fixed:
            told = f"model.{key} is {shown(theirs[key])} there, and {fixed} in every {ours['name']}"
            yield f"{told}, so the network computes something else: the weights have to learn it"
    if "heads" not in theirs:
        yield f"the file does not say its number of heads: that it is {ours['heads']} is this config's word"


def _of_resolution(fitting: Fitting) -> Iterator[str]:
    """Positions keep their limits and noise its effect [Berrada et al. 2024, appendix C and Eq. 3], where the config says so."""
    was, now = fitting.source.model.get("input_size"), fitting.model["input_size"]
    if not isinstance(was, int) or was == 0:
        return
    hints = [*_position_hint(fitting, was), *_noise_hint(fitting, now / was)]
    told = f"the source was trained at {was} x {was}, this run is at {'the same size' if was == now else f'{now} x {now}'}"
    if hints:
        yield f"{told}: to keep what positions and noise mean, set {' '.join(hints)}"
    elif was != now:
        yield f"{told}: as this config provides for"


def _position_hint(fitting: Fitting, was: int) -> Iterator[str]:
    there, here = fitting.source.model, fitting.model
    grid = there.get("position_base") or was // there.get("patch", here["patch"])
    if "position_base" in here and (here["position_base"] or here["input_size"] // here["patch"]) != grid:
        yield f"model.position_base={grid}"


def _noise_hint(fitting: Fitting, ratio: float) -> Iterator[str]:
    """A discrete schedule's `rescale` and rectified flow's `shift` do the same."""
    schedule, theirs = fitting.diffusion["schedule"], fitting.source.diffusion.get("schedule", {})
    if ratio == 1 and not theirs:
        return
    for key in ("rescale", "shift"):
        wanted = theirs.get("rescale", theirs.get("shift", 1.0)) * ratio
        if key in schedule and not math.isclose(schedule[key], wanted, rel_tol=1e-5):  # what follows the note has its six digits
            yield f"diffusion.schedule.{key}={wanted:g}"


def _of_diffusion(fitting: Fitting) -> Iterator[str]:
    if not fitting.source.diffusion:
        yield (
            "the source does not say its schedule and target: diffusion.schedule and diffusion.prediction must be those of its training, "
            "or the weights have to learn them"
        )
    for key in ("prediction", "schedule"):
        was, now = (diffusion.get(key, {}) for diffusion in (fitting.source.diffusion, fitting.diffusion))
        there, here = was.get("name"), now.get("name")
        if there is not None and there != here:
            yield f"diffusion.{key} is {shown(there)} there and {shown(here)} here: the weights have to learn it"
        for number in now:
            if number in was and number not in OF_RESOLUTION and was[number] != now[number]:
                told = f"diffusion.{key}.{number} is {shown(was[number])} there and {shown(now[number])} here"
                yield f"{told}, so the same number means another; diffusion.{key}.{number}={shown(was[number])} would keep it"


def _of_data(fitting: Fitting) -> Iterator[str]:
    theirs, ours = fitting.source.data, fitting.data
    if not theirs:
        yield "the source does not say what it was trained on: latents must have been made and scaled as this run's"
    elif theirs.get("kind") != ours["kind"]:
        yield f"the source was trained on data of the kind {shown(theirs.get('kind'))}, this run's are {shown(ours['kind'])}"
    elif theirs.get("vae") != ours["vae"]:
        yield f"the latents are of other autoencoders: {shown(theirs.get('vae'))} there, {shown(ours['vae'])} here"
    elif ours["scale"] is not None and not _same_scaling(theirs, ours):
        scaled = [", ".join(f"{key} {_rounded(data.get(key))}" for key in ("shift", "scale")) for data in (theirs, ours)]
        yield f"the latents are scaled otherwise: {scaled[0]} there, {scaled[1]} here; data.normalise=vae scales alike in every set"


def _same_scaling(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """To a hundredth of a standard deviation, which two halves of one set differ by."""
    try:
        (shift, scale), (our_shift, our_scale) = ((torch.tensor(d["shift"]), torch.tensor(d["scale"])) for d in (theirs, ours))
        return bool((((shift - our_shift) * our_scale).abs() < 0.01).all() and ((scale / our_scale - 1).abs() < 0.01).all())
    except (TypeError, ValueError, KeyError, RuntimeError):
        return False


def _rounded(values: Any) -> Any:
    numbers = isinstance(values, list) and all(isinstance(value, float | int) for value in values)
    return [round(value, 3) for value in values] if numbers else shown(values)
