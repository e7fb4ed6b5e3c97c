"""What `init_from` names, opened: a run, a safetensors file, or a diffusers folder, all under our names."""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fasttrain.checkpoint import newest_sound
from fasttrain.config import DiffusionConfig
from fasttrain.data.index import Index
from fasttrain.data.transform import LatentTransform, build_transform
from fasttrain.engine.fragments import MASTER
from fasttrain.errors import UserError
from fasttrain.files import digest
from fasttrain.init_from import InitFrom
from fasttrain.interchange import diffusers
from fasttrain.interchange.names import DIFFUSERS_DIT, DIFFUSERS_SD3, DIT, MIN_SNR_VIT, Layout
from fasttrain.interchange.tensors import Tensors, metadata_of, of_files
from fasttrain.interchange.translation import layout_of, to_ours
from fasttrain.models import MODELS
from fasttrain.models.embeddings import grid_coordinates, sincos_positions
from fasttrain.registry import printable
from fasttrain.run import check_identity, identity, read_run
from fasttrain.shares import Slices

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
LAYOUTS = (DIT, MIN_SNR_VIT, DIFFUSERS_DIT, DIFFUSERS_SD3)
RAW, FIRST_AVERAGE = "raw", "ema"
CONVERSION = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous() for k, v in w.get('ema', w).items()}, sys.argv[2])\""
)
"""Reads tensors of a pickle and nothing else, where its own checks hold; for the user to run, on a file that is trusted."""


@dataclass(frozen=True, eq=False)
class Source:
    """Weights to begin from, and what is known of the model and the data they are of.

    Attributes:
        told: which weights these are, in words.
        layout: whose names they bore.
        digest: of the files they are read from.
        tensors: under our names.
        model: fields of its config, with the registered name; only those that are known.
        diffusion: its schedule and target; empty where unknown.
        data: what it was trained on, as `of_data` tells it; empty where unknown.
    """

    told: str
    layout: str
    digest: str
    tensors: Tensors
    model: Mapping[str, Any]
    diffusion: Mapping[str, Any]
    data: Mapping[str, Any]


def open_source(given: InitFrom) -> Source:
    """Opens what a config names; reads no weights yet.

    Raises:
        UserError: it is not there, is none of the kinds that are read, is damaged, or holds no such weights.
    """
    place = Path(given.source)
    try:
        return _opened(place, given)
    except OSError as error:
        raise UserError(f"init_from: {printable(place)} cannot be read: {error.strerror or error}; name another source") from None


def _opened(place: Path, given: InitFrom) -> Source:
    if not place.exists():
        raise UserError(
            f"init_from: {printable(place)}: no such folder or file; give a run folder, a safetensors file or a diffusers folder"
        )
    if place.is_file():
        return _of_file(place, given)
    if (place / "config.yaml").is_file():
        return _of_run(place, given.weights or FIRST_AVERAGE)
    if diffusers.is_folder(place):
        return _of_diffusers(place, given)
    raise UserError(
        f"init_from: {place} is neither a run folder (it has no config.yaml) nor a diffusers folder (no config.json); "
        "give the run_dir of a `fasttrain train`, a safetensors file, or a folder with config.json and safetensors weights"
    )


def of_data(index: Index, normalise: Literal["channel", "vae"]) -> dict[str, Any]:
    """What decides whether weights trained on these data see the same numbers elsewhere, as plain data."""
    transform = build_transform(index, torch.tensor(0), normalise=normalise)
    scaling = transform if isinstance(transform, LatentTransform) else None
    return {
        "kind": index.kind,
        "classes": list(index.classes),
        "text": index.text and (index.text.xxh3 or index.text.id),
        "vae": index.vae and index.vae.model_dump(include={"id", "revision", "xxh3"}),
        "shift": scaling and scaling.shift.tolist(),
        "scale": scaling and scaling.scale.tolist(),
    }


def _of_run(folder: Path, weights: str) -> Source:
    config, index = read_run(folder)
    checkpoint, manifest, passed_over = newest_sound(folder)
    check_identity(identity(config, index), manifest.identity, checkpoint)
    key = MASTER if weights == RAW else weights
    if key not in manifest.states or weights == MASTER or weights.startswith("exp_avg"):
        known = [RAW, *(state for state in manifest.states if state.startswith("ema"))]
        raise UserError(f"init_from.weights {printable(weights)}: {folder} has {', '.join(known)}")
    slices = Slices(checkpoint, list(manifest.files))

    def read(name: str) -> Tensor:
        weight = torch.empty(manifest.shapes[name])
        slices.fill(weight.view(-1), name, key, 0)
        return weight

    damaged = f"; passed over, as damaged: {', '.join(passed_over)}" if passed_over else ""
    return Source(
        told=f"the run {folder}, {weights} weights of step {manifest.progress.step}{damaged}",
        layout="fasttrain",
        digest=" ".join(file.xxh3 for file in manifest.files.values()),
        tensors=Tensors({name: tuple(shape) for name, shape in manifest.shapes.items()}, read),
        model=config.plain()["model"],
        diffusion=config.plain()["diffusion"],
        data=of_data(index, config.data.normalise),
    )


def _of_file(path: Path, given: InitFrom) -> Source:
    _refuse_pickle(path)
    _refuse_choice(given, "a file")
    tensors, metadata = of_files([path]), metadata_of(path)
    known = {"told": f"the file {path}", "digest": digest(path)}
    if "model" in metadata:
        model, diffusion, data = _facts(path, metadata)
        known["told"] += f", {printable(metadata.get('weights', '?'))} weights of step {printable(metadata.get('step', '?'))}"
        return Source(**known, layout="fasttrain", tensors=tensors, model=model, diffusion=diffusion, data=data)
    layout = layout_of(tensors.shapes, LAYOUTS, str(path))
    ours = to_ours(tensors, layout, str(path))
    model = {**layout.always, **_inferred(layout, ours)}
    if layout is DIT and "input_size" in model and model["width"] % 4 == 0:
        positions = sincos_positions(model["width"], grid_coordinates(model["input_size"] // model["patch"]))
        _check_positions(ours, "pos_embed", positions[None], str(path))
    return Source(**known, layout=layout.name, tensors=ours, model=model, diffusion={}, data={})


def _of_diffusers(place: Path, given: InitFrom) -> Source:
    _refuse_choice(given, "a diffusers folder")
    folder, config = diffusers.read_config(place)
    files = diffusers.weight_files(folder)
    layout, model = diffusers.model_of(config, folder)
    theirs = of_files(files)
    ours = to_ours(theirs, layout_of(theirs.shapes, [layout], str(folder)), str(folder))
    for name, positions in diffusers.added(config, model).items():
        _check_positions(ours, name, positions, str(folder))
    return Source(
        told=f"the diffusers folder {folder}",
        layout=layout.name,
        digest=" ".join(digest(file) for file in files),
        tensors=ours,
        model=model,
        diffusion={},
        data={},
    )


def _refuse_choice(given: InitFrom, kind: str) -> None:
    if given.weights is not None:
        raise UserError(
            f"init_from.weights {printable(given.weights)}: {given.source} is {kind}, which holds one set of weights: leave it out"
        )


def _refuse_pickle(path: Path) -> None:
    """A pickle runs code when it is read, so none is. The command that makes another file of it loads nothing but tensors."""
    if path.suffix.lower() in PICKLES or _is_pickle(path):
        command = f"{CONVERSION} {shlex.quote(str(path))} {shlex.quote(str(path.with_suffix('.safetensors')))}"
        told = "is a pickle, which runs code when it is read, so it is not read; make a safetensors file of it once"
        raise UserError(f"init_from: {path} {told}: {command}")


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save's do, now and formerly, and cannot begin as a safetensors file does, with its header's length."""
    with path.open("rb") as file:
        start = file.read(8)
    return start.startswith((b"PK\x03\x04", b"\x80")) and int.from_bytes(start, "little") > path.stat().st_size


def _facts(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Model, diffusion and data of an export, as its header tells them, checked as a config would be."""
    config, model, data = (_json(path, metadata, key) for key in ("config", "model", "data"))
    try:
        diffusion = DiffusionConfig.model_validate(config.get("diffusion", {})).model_dump(mode="json")
        return MODELS.spec(MODELS.build(model)), diffusion, data
    except ValueError as error:
        told = str(error).splitlines()[0]
        raise UserError(f"init_from: {path} was exported by another version, or its header is damaged ({told}): export it again") from None


def _json(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"init_from: {path}: its {key} is not JSON ({error}): export it again") from None
    if not isinstance(found, dict):
        raise UserError(f"init_from: {path}: its {key} is no object: export it again")
    return found


def _inferred(layout: Layout, tensors: Tensors) -> dict[str, Any]:
    """What the names and shapes of a file without a config tell."""
    shapes = tensors.shapes
    known: dict[str, Any] = {"name": layout.model, "qk_norm": any(".qk_norm." in name for name in shapes)}
    known["depth"] = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=-1)
    embedding, table = shapes.get("x_embedder.proj.weight", shapes.get("patch_embed.proj.weight")), shapes.get("pos_embed", ())
    if embedding is not None and len(embedding) == 4:
        known.update(width=embedding[0], channels=embedding[1], patch=embedding[2])
        tokens = table[1] - (1 + ("class_embedding.weight" in shapes) if layout is MIN_SNR_VIT else 0) if len(table) == 3 else 0
        if tokens > 0:
            known["input_size"] = math.isqrt(tokens) * embedding[2]
    return known


def _check_positions(tensors: Tensors, name: str, expected: Tensor, where: str) -> None:
    """Fixed positions are made here, not taken: so those that the weights were trained with must be what is made.

    Half precision stores them to a 256th part.
    """
    if name in tensors.shapes:
        found = tensors.read(name)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=4e-3):
            raise UserError(f"init_from: {where} keeps positions that are not sin-cos ones of its grid: no model here computes with those")
