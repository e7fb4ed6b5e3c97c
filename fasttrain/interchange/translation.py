"""From another layout's names to ours and back, by the tables of names.py."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.interchange.names import Entry, Layout
from fasttrain.interchange.tensors import Tensors

BLOCK = "{i}"
MOST_TOLD = 4  # names in a message


@dataclass(frozen=True)
class _Place:
    """Where one of theirs belongs: which of ours, which part of it, and which block's copy."""

    ours: str
    part: int
    copy: int


def layout_of(names: Iterable[str], layouts: Iterable[Layout], where: str) -> Layout:
    """The layout in whose table every one of these names stands.

    Raises:
        UserError: none is; the message names the nearest and the first names that do not fit it.
    """
    strangers = {layout.name: (layout, [name for name in names if _place(name, layout) is None]) for layout in layouts}
    layout, unknown = min(strangers.values(), key=lambda found: len(found[1]))
    if unknown:
        told = ", ".join(unknown[:MOST_TOLD]) + (f" and {len(unknown) - MOST_TOLD} more" if len(unknown) > MOST_TOLD else "")
        raise UserError(
            f"init_from: the names in {where} are of no layout known here; the nearest is {layout.name}, which has no {told}: "
            f"give weights of {', '.join(strangers)}, or a run or export of fasttrain"
        )
    return layout


def to_ours(theirs: Tensors, layout: Layout, where: str) -> Tensors:
    """The same tensors under our names.

    Raises:
        UserError: a part of one of ours is missing; when it is read, copies of one tensor that differ.
    """
    found: dict[str, dict[tuple[int, int], str]] = {}
    for name in theirs.shapes:
        if (place := _place(name, layout)) is not None:
            found.setdefault(place.ours, {})[place.copy, place.part] = name
    parts = {ours: _complete(ours, pieces, layout, where) for ours, pieces in found.items()}
    return Tensors(
        {ours: _stacked([theirs.shapes[name] for name in copies[0]], ours, where) for ours, copies in parts.items()},
        lambda ours: _assembled(ours, [torch.cat([theirs.read(name) for name in copy]) for copy in parts[ours]], where),
    )


def to_theirs(ours: Mapping[str, Tensor], layout: Layout, depth: int) -> dict[str, Tensor]:
    """Our tensors under a layout's names: cut where it keeps several, copied where each of its blocks has one.

    Raises:
        ValueError: a name that the layout has no place for.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        for entry in layout.entries:
            if (match := _pattern(entry.ours).fullmatch(name)) is not None:
                made.update(_cut(entry, match, tensor, depth))
                break
        else:
            raise ValueError(f"{layout.name} has no place for {name}")
    return made


def _cut(entry: Entry, match: re.Match[str], tensor: Tensor, depth: int) -> Iterator[tuple[str, Tensor]]:
    blocks = [int(match[1])] if BLOCK in entry.ours else range(depth)
    for theirs, piece in zip(entry.theirs, tensor.chunk(len(entry.theirs)), strict=True):
        for i in blocks if BLOCK in theirs else [0]:
            yield theirs.replace(BLOCK, str(i)), piece.clone()  # files hold no tensor twice


def _place(name: str, layout: Layout) -> _Place | None:
    for entry in layout.entries:
        for part, theirs in enumerate(entry.theirs):
            if (match := _pattern(theirs).fullmatch(name)) is not None:
                block = match[1] if BLOCK in theirs else ""
                copied = BLOCK in theirs and BLOCK not in entry.ours
                return _Place(entry.ours.replace(BLOCK, block), part, int(block) if copied else 0)
    return None


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(re.escape(BLOCK), "([0-9]{1,3})"))


def _complete(ours: str, pieces: dict[tuple[int, int], str], layout: Layout, where: str) -> list[list[str]]:
    """Their names of each copy's parts, in order."""
    [wanted] = {len(entry.theirs) for entry in layout.entries if _pattern(entry.ours).fullmatch(ours)}
    copies = [[pieces[copy, part] for part in range(wanted) if (copy, part) in pieces] for copy in sorted({copy for copy, _ in pieces})]
    for copy in copies:
        if len(copy) < wanted:
            raise UserError(f"init_from: {where} holds {', '.join(copy)}, but not all {wanted} parts of {ours}: fetch or export it again")
    return copies


def _stacked(shapes: list[tuple[int, ...]], ours: str, where: str) -> tuple[int, ...]:
    if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
        told = ", ".join(str(list(shape)) for shape in shapes)
        raise UserError(f"init_from: the parts of {ours} in {where} are {told}, which do not stack: it is no checkpoint of this layout")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _assembled(ours: str, copies: list[Tensor], where: str) -> Tensor:
    if any(not torch.equal(copy, copies[0]) for copy in copies[1:]):
        raise UserError(
            f"init_from: {where} keeps {ours} in every block, and its blocks differ, as after training in that form: a model here has it "
            "once, so these weights cannot be taken"
        )
    return copies[0]
