"""`fasttrain export RUN OUT`: a run's weights as one safetensors file with its config inside, or as a folder for diffusers."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.commands.generating import refuse_untrained, tell_passed_over
from fasttrain.errors import UserError
from fasttrain.interchange import diffusers
from fasttrain.interchange.source import of_data
from fasttrain.models import MODELS
from fasttrain.tensor_file import write_tensors
from fasttrain.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder of a `fasttrain train`")
    parser.add_argument("out", type=Path, help="file to write, e.g. model.safetensors; for diffusers, folder")
    parser.add_argument("--weights", default="ema", help="ema, ema_1 ..., or raw (default ema)")
    parser.add_argument(
        "--format",
        choices=("safetensors", "diffusers"),
        default="safetensors",
        help="a file with this project's names (dit: those of DiT's public code), or what DiTTransformer2DModel or SD3Transformer2DModel "
        "loads with from_pretrained (default safetensors)",
    )


def run(args: argparse.Namespace) -> None:
    refuse_untrained([args.weights], "there is nothing to export: give ema or raw")
    trained = Trained.load(args.run, args.weights, torch.device("cpu"))
    tell_passed_over(trained)
    {"safetensors": _write_file, "diffusers": _write_folder}[args.format](trained, args.out)
    print(f"{trained.weights} weights of step {trained.step}: {args.out}")


def _facts(trained: Trained) -> dict[str, Any]:
    """What whoever reads the weights must know: model and config to build and train it again, the data that it saw, which weights."""
    return {
        "model": MODELS.spec(trained.config.model),
        "config": trained.config.plain(),
        "data": of_data(trained.index, trained.config.data.normalise),
        "weights": trained.weights,
        "step": trained.step,
    }


def _weights(trained: Trained) -> dict[str, Tensor]:
    """The model's own: an uncertainty is of the training, and no model that others build has one."""
    return {name: tensor for name, tensor in trained.network.state_dict().items() if not name.startswith("uncertainty.")}


def _write_file(trained: Trained, out: Path) -> None:
    # File metadata is text: MODELS.build(json.loads(metadata["model"])) builds the network again.
    facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _facts(trained).items()}
    try:
        write_tensors(out, _weights(trained), {"format": "pt", **facts})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; make room or choose another file") from None


def _write_folder(trained: Trained, out: Path) -> None:
    for told in diffusers.write_folder(out, _facts(trained), _weights(trained)):
        print(told)
