"""`fasttrain export RUN OUT`: one safetensors file of a run's weights, with its config inside."""

import argparse
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fasttrain.commands.sample import tell_passed_over
from fasttrain.errors import UserError
from fasttrain.files import whole
from fasttrain.models import MODELS
from fasttrain.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder of a `fasttrain train`")
    parser.add_argument("out", type=Path, help="file to write, e.g. model.safetensors")
    parser.add_argument("--weights", default="ema", help="ema, ema_1 ..., or raw (default ema)")


def run(args: argparse.Namespace) -> None:
    trained = Trained.load(args.run, args.weights, torch.device("cpu"))
    tell_passed_over(trained)
    # File metadata is text: the config travels as JSON, and MODELS.build(json.loads(metadata["model"])) builds the network again.
    metadata = {
        "format": "pt",
        "model": json.dumps(MODELS.spec(trained.config.model)),
        "config": json.dumps(trained.config.plain()),
        "weights": trained.weights,
        "step": str(trained.step),
    }
    try:
        with whole(args.out) as draft:
            save_file({name: tensor.contiguous() for name, tensor in trained.network.state_dict().items()}, draft, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {args.out}: {error}; make room or choose another file") from None
    print(f"{trained.weights} weights of step {trained.step}: {args.out}")
