"""A run on disk: its folder, what it was made of, and what must not change between its starts.

RUN/config.yaml        the resolved config of the last start      RUN/checkpoints/   see checkpoint.py
RUN/environment.json   versions, devices, processes               RUN/samples/       grids drawn during training
RUN/data.json          the index of the training shards           RUN/tensorboard/   the reports for TensorBoard
RUN/metrics.jsonl      one record a report                        RUN/skipped.jsonl  steps that were not finite; see skipping.py
RUN/diverged.json      why a run ended, of too many of these      RUN/replays/       steps taken again; see replay.py
RUN/lock               held by the training in it                 RUN/faults/N/      a lost rank, and every living one's stacks
"""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml

from fasttrain.config import RunConfig, SamplingConfig, load_config
from fasttrain.data.crops import crops_of
from fasttrain.data.facts import require_recorded
from fasttrain.data.index import Index
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.files import write_whole
from fasttrain.lengths import filled
from fasttrain.models import MODELS, Transformer
from fasttrain.models.mmdit import MmDiT
from fasttrain.registry import shown
from fasttrain.versions import installed

_PACKAGES = ("fasttrain", "torch", "triton", "deepspeed", "numpy", "webdataset", "safetensors", "flash-attn", "diffusers")


def resolve(config: RunConfig, index: Index, begun: Mapping[str, int] | None = None) -> RunConfig:
    """The config with open fields filled in, from the data and the run's length, and DeepSpeed's settings in place of their file's name.

    Args:
        begun: the lengths that the run has gone by so far; see lengths.py.

    Raises:
        UserError: the data's shape, classes, text, facts or VAE contradict the config; the message names both keys.
    """
    channels, height, width = index.x0_shape
    model = config.model
    if height != width:
        raise UserError(
            f"data.train: {config.data.train} holds {height} x {width} samples; models here take square ones: prepare it with --size"
        )
    crops = crops_of(config.data, index, config.seed)
    side = crops.size if crops else height
    if model.channels not in (None, channels) or model.input_size not in (None, side):
        raise UserError(
            f"model.channels {model.channels} and model.input_size {model.input_size} do not fit {config.data.train}, whose samples are "
            f"{channels} x {side} x {side}; leave both out to take them from the data, or prepare the data at that size"
        )
    if model.num_classes and model.num_classes < index.num_classes:
        raise UserError(
            f"model.num_classes {model.num_classes} is too small for {config.data.train}, which has {index.num_classes} classes; "
            "leave it out or raise it"
        )
    _check_vae(config, index)
    num_classes = (0 if index.text else index.num_classes) if model.num_classes is None else model.num_classes
    if not (num_classes or index.text) and config.sampling.every and config.sampling.guidance.scale != 1:
        raise UserError(f"sampling.guidance {config.sampling.guidance.scale:g} needs classes, and this model has none: set it to 1")
    _check_guidance(config.sampling)
    found = {"channels": channels, "input_size": side, "num_classes": num_classes, **_told(config, index)}
    try:
        model = dataclasses.replace(model, **found)
    except ValueError as error:
        raise UserError(f"{error}; input_size comes from {config.data.train}") from None
    return filled(config, begun or {}).model_copy(update={"model": model, "deepspeed": config.deepspeed_settings()})


def _told(config: RunConfig, index: Index) -> dict[str, Any]:
    """The open fields of a model that is told controls or text."""
    model, text = config.model, index.text
    if config.controls:
        require_recorded(config.controls, index, config.data.train)
        controlled = {"num_timesteps": config.diffusion.schedule.num_timesteps}
        _check_told(model, controlled, "diffusion.schedule has")
    else:
        controlled = {}
    if not isinstance(model, MmDiT):
        return controlled
    if text is None:
        _check_wants_no_text(model, config.data.train)
        return controlled
    shapes = {"text_tokens": text.tokens, "text_width": text.width, "text_pooled": text.pooled}
    _check_told(model, shapes, f"the text of encoder {text.id!r} that belongs to {config.data.train} has")
    how = config.data.text_padding.how
    if model.masked_text and how != "none":
        raise UserError(f"model.masked_text is true, but data.text_padding.how is {how}: set it to none, which masks by itself")
    return {**controlled, **shapes, "masked_text": how == "none"}


def _check_wants_no_text(model: MmDiT, place: str) -> None:
    """Refuses what a model of classes would pass over in silence."""
    for key in ("pooled", "masked_text", "text_pooled"):
        if value := getattr(model, key):
            told = f"model.{key} is {shown(value)}, and there is no text: an mmdit on {place} is told classes alone"
            raise UserError(f"{told}; leave it out, or give the set text with `fasttrain prepare text` and remove model.num_classes")


def _check_guidance(sampling: SamplingConfig) -> None:
    """Refuses what there is no guidance for to change: it would be passed over in silence."""
    guidance = sampling.guidance
    if guidance.resolution != 1 and guidance.scale == 1:
        raise UserError(
            f"sampling.guidance.resolution {guidance.resolution:g} multiplies what guidance adds, and sampling.guidance.scale is 1, which "
            "adds nothing: give the scale that was found best at the smaller size, or leave resolution out"
        )
    if guidance.interval != (0, 1) and guidance.scale == 1 and guidance.controls == 1:
        raise UserError(
            f"sampling.guidance.interval {list(guidance.interval)} limits guidance, and there is none with scale 1 and controls 1: "
            "give either another value, or leave interval out"
        )


def _check_told(model: Transformer, found: dict[str, Any], source: str) -> None:
    for key, value in found.items():
        if getattr(model, key) not in (None, value):
            raise UserError(f"model.{key} is {getattr(model, key)}, but {source} {value}: leave it out, or change the other")


def identity(config: RunConfig, index: Index) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it, for the result to be the run's."""
    diffusion = config.plain()["diffusion"]
    model = {key: value for key, value in MODELS.spec(config.model).items() if key != "checkpoint_blocks"}
    return {
        "model": model,
        "diffusion.schedule": diffusion["schedule"],
        "diffusion.prediction": diffusion["prediction"],
        **({"diffusion.uncertainty": True} if config.diffusion.uncertainty else {}),  # as in checkpoints from before there was any
        "data": {
            "labels": index.labels_xxh3,
            "shards": [shard.xxh3 for shard in index.shards],
            "text": index.text.text_xxh3 if index.text else None,
            "text_padding": config.data.text_padding.model_dump(mode="json") if index.text else None,
            "facts": index.facts_xxh3 if config.controls else None,
            **config.data.model_dump(include={"held_out", "normalise", "streams", "window_shards", "crop_scale"}, mode="json"),
        },
        "seed": config.seed,
    }


def check_identity(mine: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """Refuses to continue a run with another model, target, schedule, data set or seed."""
    for key in {**mine, **saved}:
        if mine.get(key, _ABSENT) != saved.get(key, _ABSENT):
            was, now = _first_difference(saved.get(key, _ABSENT), mine.get(key, _ABSENT))
            raise UserError(
                f"{folder} was trained with {key} {was}, this config says {now}: restore it, or choose another run_dir for a new run"
            )


def check_same(config: RunConfig, mine: dict[str, Any], processes: Processes) -> None:
    """Refuses to train where a rank has another config or other data than rank 0. A collective.

    Where the data lies, and its cache, may differ from host to host: `mine`, this rank's `identity`, says what is in it.
    """
    plain = config.plain()
    plain["data"] = {key: value for key, value in plain["data"].items() if key not in ("train", "text", "cache")}
    plain["the data set"] = xxhash.xxh3_128_hexdigest(json.dumps(mine["data"], sort_keys=True).encode())
    everyone = processes.gather(plain)
    if different := [rank for rank, other in enumerate(everyone) if other != everyone[0]]:
        was, now = _first_difference(everyone[0], everyone[different[0]])
        raise UserError(f"ranks {different} were started with another config or other data: rank 0 has {was}, rank {different[0]} {now}")


def write_folder(config: RunConfig, index: Index, processes: Processes) -> None:
    """Makes the run folder and writes into it (rank 0) the resolved config, the environment, and the index of the data."""
    folder = config.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not processes.is_main:
            return
        write_whole(folder / "data.json", index.model_dump_json(indent=1) + "\n")
        write_whole(folder / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False))
        write_whole(folder / "environment.json", json.dumps(environment(processes), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run_dir {folder}: cannot write there: {error.strerror}") from None


def read_run(folder: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Index]:
    """The resolved config of a run folder, its `run_dir` set to where the folder is now, and the index of what it trained on."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml; give the run_dir of a `fasttrain train`")
    try:
        index = Index.model_validate_json((folder / "data.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'data.json'} cannot be read ({error}); train the run again, or restore it") from None
    return load_config(path, overrides).model_copy(update={"run_dir": folder}), index


def environment(processes: Processes) -> dict[str, Any]:
    """What the run runs on: versions and devices; no paths, names or secrets."""
    device = processes.device
    return {
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": processes.world_size,
    }


def _check_vae(config: RunConfig, index: Index) -> None:
    wanted = config.data.vae
    if wanted is None:
        return
    if index.vae is None:
        raise UserError(f"data.vae is {wanted!r}, but {config.data.train} holds images, not latents: remove data.vae, or prepare latents")
    if Path(wanted).name != Path(index.vae.id).name:
        raise UserError(
            f"data.vae is {wanted!r}, but the latents in {config.data.train} were made with {index.vae.id!r}: "
            "name that one, or prepare them again"
        )


class _Absent:
    """What stands where one side has a key and the other has not."""

    def __repr__(self) -> str:
        return "(not given)"


_ABSENT = _Absent()


def _first_difference(saved: Any, mine: Any, path: str = "") -> tuple[str, str]:
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(saved, dict) and isinstance(mine, dict):
        pairs = [(f"{path}.{key}" if path else f"{key}", saved.get(key, _ABSENT), mine.get(key, _ABSENT)) for key in {**saved, **mine}]
    elif isinstance(saved, list) and isinstance(mine, list) and len(saved) == len(mine):
        pairs = [(f"{path}[{number}]", was, now) for number, (was, now) in enumerate(zip(saved, mine, strict=True))]
    for inner, was, now in pairs:
        if was != now:
            return _first_difference(was, now, inner)
    return f"{path} {shown(saved)}".strip(), f"{path} {shown(mine)}".strip()
