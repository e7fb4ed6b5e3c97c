"""diffusers' folders, config.json and safetensors weights: read and written without diffusers itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.files import write_whole
from fasttrain.interchange.forms import FORMS, Form
from fasttrain.interchange.names import Layout
from fasttrain.interchange.translation import to_theirs
from fasttrain.registry import nearest, printable, shown
from fasttrain.tensor_file import write_tensors

CONFIG, WEIGHTS, FACTS = "config.json", "diffusion_pytorch_model.safetensors", "fasttrain.json"
PIPELINE, SHARDED = "model_index.json", f"{WEIGHTS}.index.json"
_LARGEST = 1 << 26  # bytes of a JSON file: more is no config


def is_folder(place: Path) -> bool:
    """Whether diffusers could have written this folder, of a model or of a pipeline."""
    return (place / CONFIG).is_file() or (place / PIPELINE).is_file()


def read_config(place: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the transformer, which in a pipeline's is `transformer`, and its config.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    folder = place if (place / CONFIG).is_file() else place / "transformer"
    return folder, _object(folder / CONFIG)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder.

    Raises:
        UserError: it has none, or its list of them names other places.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / SHARDED).is_file():
        names = _object(folder / SHARDED).get("weight_map")
        found = sorted(set(names.values())) if isinstance(names, dict) and all(isinstance(n, str) for n in names.values()) else []
        if not found or any(Path(name).name != name or not name.endswith(".safetensors") for name in found):
            raise UserError(f"init_from: {folder / SHARDED} lists no safetensors files beside it: fetch the folder again")
        return [folder / name for name in found]
    pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".ckpt")]
    told = f"only {', '.join(pickles)}, which run code when they are read" if pickles else "no weights"
    raise UserError(
        f"init_from: {folder} has {told}: give one with {WEIGHTS} (in diffusers: model.save_pretrained(FOLDER), which writes safetensors)"
    )


def model_of(config: Mapping[str, Any], folder: Path) -> tuple[Layout, dict[str, Any]]:
    """The names of a folder's weights, and the fields of our model that computes the same.

    Raises:
        UserError: another class, or a value that no model here computes.
    """
    path = folder / CONFIG
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in FORMS:
        raise UserError(f"init_from: {path} is of {shown(name)}; {nearest(name, FORMS)}")
    form = FORMS[name]
    known = {**form.defaults, **{key: value for key, value in config.items() if not key.startswith("_")}}
    for key, wanted in form.fixed.items():
        if known[key] not in wanted:
            told = " or ".join(map(repr, wanted))
            raise UserError(f"init_from: {path}: {key} is {shown(known[key])}; no model here computes that, only {told}")
    for key, default in form.defaults.items():
        if isinstance(default, int) and not isinstance(default, bool) and (type(known[key]) is not int or known[key] < 1):
            raise UserError(f"init_from: {path}: {key} is {shown(known[key])}, not a whole number above 0: fetch the folder again")
    known["out_channels"] = known["out_channels"] or known["in_channels"]
    return form.layout, form.ours(known)


def added(config: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a folder of this config keeps beside parameters, as our fields say that it is, under our names."""
    return FORMS[config["_class_name"]].added(model)


def form_of(model: Mapping[str, Any]) -> tuple[str, Form]:
    """The class of diffusers that computes what a model of ours does.

    Raises:
        UserError: there is none, or it cannot express something that this model has; the message names it.
    """
    for name, form in FORMS.items():
        if form.layout.model == model["name"]:
            if beyond := form.inexpressible(model):
                raise UserError(f"--format diffusers: {name} cannot express {', '.join(beyond)}: export it as safetensors")
            return name, form
    models = ", ".join(form.layout.model for form in FORMS.values())
    raise UserError(f"--format diffusers: diffusers has no class for the model {printable(model['name'])}, only for {models}")


def write_folder(out: Path, facts: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """Writes a folder that the class's `from_pretrained` loads, with what it cannot say in README.md and fasttrain.json; config.json last.

    Args:
        facts: `model`, fields of our model with its registered name; `config`, `data`, `weights` and `step` of the run.
        weights: all of the model's parameters, frozen ones included.

    Returns:
        What a user of the folder must know, a line each.

    Raises:
        UserError: as `form_of`, or it cannot be written.
    """
    model = facts["model"]
    name, form = form_of(model)
    if out.is_dir() and any(out.iterdir()) and not (out / FACTS).is_file():
        raise UserError(f"{out}: holds other files, and is no earlier export; give an empty or a new folder")
    kept = {key: value for key, value in weights.items() if key not in form.computed} | form.added(model)
    tensors, advice = to_theirs(kept, form.layout, model["depth"]), form.advice(model)
    try:
        (out / CONFIG).unlink(missing_ok=True)  # written last: a folder without it is no model
        write_tensors(out / WEIGHTS, tensors, {"format": "pt"})
        write_whole(out / FACTS, json.dumps(facts, indent=1) + "\n")
        write_whole(out / "README.md", _readme(name, facts, advice))
        write_whole(out / CONFIG, json.dumps({"_class_name": name, **form.theirs(model)}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; make room or choose another folder") from None
    return advice


def _readme(name: str, facts: Mapping[str, Any], advice: list[str]) -> str:
    """What the class's config has no keys for."""
    diffusion, data = facts["config"]["diffusion"], facts["data"]
    scaling = f"x0 = (z - shift) * scale of the latents z, shift {data['shift']}, scale {data['scale']} by channel"
    lines = [
        f"# {name}: {facts['weights']} weights of step {facts['step']} of a run of fasttrain",
        "",
        "```python",
        f"from diffusers import {name}",
        f'model = {name}.from_pretrained("this folder")',
        *advice,
        "```",
        "",
        f"- Timesteps: of the schedule {json.dumps(diffusion['schedule'])}.",
        f"- Output: the prediction {json.dumps(diffusion['prediction'])} (eps, x0, v = alpha eps - sigma x0, flow = eps - x0, "
        "or edm = (sigma x0 / d - d alpha eps) / r of an input x_t / r, r = sqrt(sigma^2 + d^2 alpha^2), d = sigma_data).",
        f"- Input: {scaling if data['scale'] else 'x0 = pixels in [-1, 1]'}. Autoencoder: {json.dumps(data['vae'])}.",
        f"- Text encoder: {json.dumps(data['text'])}. Classes: {facts['model'].get('num_classes')}; one past the last means none.",
        "- The whole config of the run: fasttrain.json.",
    ]
    return "\n".join(lines) + "\n"


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"init_from: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"init_from: {path} is not JSON ({error}): fetch the folder again") from None
    if not isinstance(found, dict):
        raise UserError(f"init_from: {path} holds no object: fetch the folder again")
    return found
