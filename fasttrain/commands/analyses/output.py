"""Where an analysis leaves its numbers and its picture."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttrain.commands.destination import writing_to
from fasttrain.files import write_whole
from fasttrain.lines import jsonable


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder for the JSON file and the picture (default: RUN/analysis)")


def folder_of(args: argparse.Namespace, run: Path) -> Path:
    """The folder that is asked for."""
    return args.out or run / "analysis"


def write(folder: Path, name: str, result: dict[str, Any], draw: Callable[[Path], None]) -> None:
    """Writes NAME.json, and by `draw` NAME.png; says where.

    Raises:
        UserError: the folder cannot be written to.
    """
    numbers, picture = folder / f"{name}.json", folder / f"{name}.png"
    with writing_to(folder):
        write_whole(numbers, json.dumps(jsonable(result), indent=1) + "\n")
        draw(picture)
    print(f"{numbers}\n{picture}")
