"""Which of a source's weights a model takes, which are resized, which are made anew: decided from names, shapes and configs alone.

A difference that the two configs explain (other classes, resolution, text instead of classes ...) is a row of the plan; any other is an
error. No weight is read before the plan is made.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fasttrain.errors import UserError
from fasttrain.interchange import geometry
from fasttrain.interchange.fitting import Fitting, Plan, Row
from fasttrain.interchange.notes import notes
from fasttrain.registry import shown

MUST_AGREE = ("form", "depth", "width", "heads", "channels")
"""Fields that no weights can be fitted across, where they are known of the source."""

FROM_DIT = ("dit", "mmdit", "shared")
"""A DiT's blocks are those of mmDiT's shared form but for the text's own queries, keys and values."""


def plan(fitting: Fitting) -> Plan:
    """The plan, or the first reason against it.

    Raises:
        UserError: another model or size, or a difference that nothing explains; the message names it and the remedy.
    """
    _check_model(fitting)
    rows = tuple(_rule(name)(fitting, name) for name in fitting.shapes)
    return Plan(rows, _left_out(fitting), tuple(notes(fitting)))


def _check_model(fitting: Fitting) -> None:
    there, here = fitting.source.model.get("name"), fitting.model["name"]
    if there != here and (there, here, fitting.model.get("form")) != FROM_DIT:
        raise UserError(
            f"init_from: model.name is {shown(there)} in {fitting.source.told} and {here!r} here, and the one cannot begin from the other "
            "(only mmdit's shared form from a dit): choose that model, or name another source"
        )
    for key in MUST_AGREE:
        if fitting.differs(key):
            was, now = (shown(model[key]) for model in (fitting.source.model, fitting.model))
            raise UserError(
                f"init_from: model.{key} is {was} in {fitting.source.told} and {now} here: set model.{key}={was}, or name another source"
            )


def _class_table(fitting: Fitting, name: str) -> Row:
    shape, was = fitting.shapes[name], fitting.was(name)
    if was is None:
        return fitting.fresh(name, "the source has no classes")
    if _class_enters(fitting.source.model) != _class_enters(fitting.model):
        return fitting.fresh(name, "the class enters the network elsewhere there")
    if was != shape and was[1:] == shape[1:]:
        return fitting.fresh(name, f"{was[0] - 1} classes there, {shape[0] - 1} here")
    if _others(fitting, "classes"):
        return fitting.fresh(name, "classes of other names there")
    return fitting.taken(name)


def _class_enters(model: Mapping[str, Any]) -> str:
    """Where: a DiT's may be a part of what modulates, all others' is a token."""
    return model.get("conditioning", "adaln") if model["name"] == "dit" else "attention"


def _text_embedder(fitting: Fitting, name: str) -> Row:
    """The layers that take an encoder's vectors: taken whole or not at all."""
    first = "context_embedder.weight" if name.startswith("context") else "pooled_embedder.0.weight"
    if fitting.was(first) is None:
        return fitting.fresh(name, "the source has no text there")
    if fitting.was(first) != fitting.shapes[first]:
        return fitting.fresh(name, "text of another width there")
    if _others(fitting, "text"):
        return fitting.fresh(name, "text of another encoder there")
    return fitting.taken(name)


def _others(fitting: Fitting, what: str) -> bool:
    """Whether the source was trained on another of this, as far as is known."""
    theirs: Any = fitting.source.data.get(what)
    return theirs is not None and theirs != fitting.data.get(what)


def _joint_qkv(fitting: Fitting, name: str) -> Row:
    """Text and image each begin with a DiT's own, which are those of its one sequence."""
    if fitting.source.model["name"] != "dit":
        return fitting.taken(name)
    of = re.sub(r"(text|image)_qkv", "qkv", name)
    if fitting.was(of) != fitting.shapes[name]:
        return fitting.taken(name)
    return fitting.made(name, "copied", lambda: fitting.source.tensors.read(of), f"of {_general(of)}", of)


def _qk_norm(fitting: Fitting, name: str) -> Row:
    of = re.sub(r"_(text|image)$", "", name) if fitting.source.model["name"] == "dit" else name
    if fitting.was(of) is None:
        return fitting.fresh(name, "queries and keys are not normalised there")
    if of == name or fitting.was(of) != fitting.shapes[name]:
        return fitting.taken(name)
    return fitting.made(name, "copied", lambda: fitting.source.tensors.read(of), f"of {_general(of)}", of)


def _controls(fitting: Fitting, name: str) -> Row:
    """An embedder is taken whole or not at all: a fresh one starts at zero, and changes nothing until it has learned."""
    prefix, level, _ = re.split(r"\.(high|low)\.", name)
    if "controls" in fitting.source.model:
        theirs, ours = ([n for n, at in model["controls"].items() if at == level] for model in (fitting.source.model, fitting.model))
        same = theirs == ours
    else:
        first = f"{prefix}.{level}.0.weight"
        same = fitting.was(first) == fitting.shapes[first]
    return fitting.taken(name) if same else fitting.fresh(name, "other controls there; zero at the start")


def _uncertainty(fitting: Fitting, name: str) -> Row:
    """No part of the model: it starts at zero, and learns of this run's own losses."""
    return fitting.fresh(name, "no uncertainty was learned there") if fitting.was(name) is None else fitting.taken(name)


def _taken(fitting: Fitting, name: str) -> Row:
    return fitting.taken(name)


def _general(name: str) -> str:
    return re.sub(r"^blocks\.[0-9]+\.", "blocks.*.", name)


CLASS_TABLE = r"y_embedder\.embedding_table\.weight|class_embedding\.weight"
TEXT_EMBEDDER = r"(context_embedder|pooled_embedder)\..*"
PATCH_EMBEDDING = r"(x_embedder|patch_embed)\.proj\.(weight|bias)"
LAST_LAYER = r"(final_layer\.linear|linear_projection)\.(weight|bias)"
QK_NORM = r"blocks\.[0-9]+\.attn\.qk_norm\..*"
CONTROLS = r"control_embedder\.(high|low)\..*"
UNCERTAINTY = r"uncertainty\.weight"

Rule = Callable[[Fitting, str], Row]
RULES: tuple[tuple[str, Rule], ...] = (
    (CLASS_TABLE, _class_table),
    (TEXT_EMBEDDER, _text_embedder),
    (r"pos_embed", geometry.positions),
    (r"time_embedding\.weight", geometry.time_table),
    (PATCH_EMBEDDING, geometry.patch_embedding),
    (LAST_LAYER, geometry.last_layer),
    (r"blocks\.[0-9]+\.attn\.(text|image)_qkv\.(weight|bias)", _joint_qkv),
    (QK_NORM, _qk_norm),
    (CONTROLS, _controls),
    (UNCERTAINTY, _uncertainty),
)
"""The first whose pattern fits a parameter's name decides; all others are taken as they are."""


def _rule(name: str) -> Rule:
    return next((rule for pattern, rule in RULES if re.fullmatch(pattern, name)), _taken)


UNUSED: tuple[tuple[str, str], ...] = (
    (CLASS_TABLE, "not these classes here"),
    (TEXT_EMBEDDER, "not this text here"),
    (r"pos_embed|positions", "made for this model's own grid"),
    (PATCH_EMBEDDING, "of another patch"),
    (LAST_LAYER, "of another patch"),
    (QK_NORM, "queries and keys are not normalised here"),
    (CONTROLS, "not these controls here"),
    (UNCERTAINTY, "no uncertainty is learned here"),
)
"""What of a source may stay behind, and why."""


def _left_out(fitting: Fitting) -> dict[str, str]:
    left = {}
    for name, shape in fitting.source.tensors.shapes.items():
        if name in fitting.used:
            continue
        why = next((why for pattern, why in UNUSED if re.fullmatch(pattern, name)), None)
        if why is None:
            raise UserError(
                f"init_from: {fitting.source.told} holds {name} {list(shape)}, for which this model has no place, and no difference "
                "between their configs explains it: give this config the model of the source, or name another source"
            )
        left[name] = why
    return left
