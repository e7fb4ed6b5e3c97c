"""The rules for weights whose shape depends on resolution, patch and number of outputs."""

import math

import torch
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.interchange.fitting import Fitting, Row
from fasttrain.interchange.resizing import outputs_of, resampled_positions, resized_embedding, resized_outputs
from fasttrain.registry import shown

CLASS = "class_embedding.weight"


def positions(fitting: Fitting, name: str) -> Row:
    """Learned ones, of the vanilla ViT: time, class where there is one, then patches."""
    shape, was = fitting.shapes[name], fitting.was(name)
    here, there = (1 + (CLASS in names) for names in (fitting.shapes, fitting.source.tensors.shapes))
    grid = math.isqrt(shape[1] - here)
    if (was == shape and here == there) or was is None or len(was) != 3 or was[2] != shape[2] or not _is_square(was[1] - there):
        return fitting.taken(name)
    if fitting.asked.positions == "fresh":
        return fitting.fresh(name, "init_from.positions is fresh")

    def make() -> Tensor:
        learned = fitting.source.tensors.read(name)
        head = torch.cat([learned[:, :there], learned.new_zeros(1, 1, shape[2])], dim=1)[:, :here]
        return resampled_positions(torch.cat([head, learned[:, there:]], dim=1), here, grid)

    changed = "" if here == there else "; the class token's is left out" if here < there else "; the class token's is zero"
    return fitting.made(name, "resized", make, f"grid {math.isqrt(was[1] - there)} to {grid}, bicubic{changed}")


def time_table(fitting: Fitting, name: str) -> Row:
    """A row a timestep: of more there, the first."""
    shape, was = fitting.shapes[name], fitting.was(name)
    if was is None or was[1:] != shape[1:] or was == shape:
        return fitting.taken(name)
    if was[0] < shape[0]:
        told = f"{fitting.source.told} knows {was[0]} timesteps and this model has {shape[0]}"
        raise UserError(f"init_from: {told}: set model.num_timesteps={was[0]}")
    return fitting.made(name, "resized", lambda: fitting.source.tensors.read(name)[: shape[0]], f"the first of {was[0]} timesteps")


def patch_embedding(fitting: Fitting, name: str) -> Row:
    there, here = _patches(fitting)
    if there == here:
        return fitting.taken(name)
    if fitting.asked.patch == "fresh":
        return fitting.fresh(name, f"patch {there} to {here}")
    shape, was = fitting.shapes[name], fitting.was(name)
    if was is None or len(was) != 4 or was[:2] != shape[:2]:
        return fitting.taken(name)  # the bias, or a mistake
    return fitting.made(name, "resized", lambda: resized_embedding(fitting.source.tensors.read(name), here), f"patch {there} to {here}")


def last_layer(fitting: Fitting, name: str) -> Row:
    """Its rows are the values of a patch, channel last; a learned sigma's channels come behind the prediction's."""
    old, new = _patches(fitting)
    shape, was, channels = fitting.shapes[name], fitting.was(name), fitting.model["channels"]
    there, here = (was[0] / old**2 if was else 0), shape[0] / new**2
    if was is None or was[1:] != shape[1:] or not {there, here} <= {channels, 2 * channels} or (old, there) == (new, here):
        return fitting.taken(name)
    if old != new and fitting.asked.patch == "fresh":
        return fitting.fresh(name, f"patch {old} to {new}")

    def make() -> Tensor:
        rows = outputs_of(fitting.source.tensors.read(name), old, round(there), round(here))
        return rows if old == new else resized_outputs(rows, old, new, round(here))

    sigma = "" if there == here else "without its learned sigma" if there > here else "the learned sigma's rows are zero"
    why = ", ".join(words for words in (f"patch {old} to {new}" if old != new else "", sigma) if words)
    return fitting.made(name, "resized", make, why)


def _patches(fitting: Fitting) -> tuple[int, int]:
    """The side of a patch in the source, and here.

    Raises:
        UserError: they differ, and nobody has said what to do then.
    """
    here = fitting.model["patch"]
    there = fitting.source.model.get("patch", here)
    if there != here and fitting.asked.patch is None:
        raise UserError(
            f"init_from: model.patch is {shown(there)} in {fitting.source.told} and {here} here: set model.patch={shown(there)}, or "
            "init_from.patch to `resize` for a resized patch embedding and last layer, or to `fresh` for new ones"
        )
    return there, here


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
