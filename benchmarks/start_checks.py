"""Everything that a start checks before it trains, done to one config: what `fasttrain train` would say to it."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.config_mutants import Mutant, mutant
from benchmarks.config_vocabulary import CANARY
from fasttrain.config import RunConfig, load_config, parse_config
from fasttrain.data.index import read_index
from fasttrain.dry_run import dry_run
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.run import identity, resolve, write_folder

ACCEPTED, REFUSED = "accepted", "refused"
_WORLDS = (1, 2)
_NAMED = re.compile(
    r"run_dir|seed|kernels|attention|data|model|diffusion|optimizer|training|checkpoint|sampling|log|init_from|deepspeed|override|run\.yaml|prediction|shards"
)
_ALONE = Processes(0, 1, 0, torch.device("cpu"), None)  # type: ignore[arg-type] # writing a run folder needs no group


def config_trial(number: int, folder: Path, *, seed: int, bases: list[dict[str, Any]], source: Path) -> tuple[str, str]:
    """One mutated config through a start in `folder`, beside the DeepSpeed files: accepted, or refused in one clear message."""
    made = mutant(bases, seed, number) if number >= 0 else Mutant(yaml.safe_dump(bases[0]).encode(), [], [])
    shutil.copytree(source / "configs" / "deepspeed", folder / "configs" / "deepspeed")
    path = folder / "run.yaml"
    path.write_bytes(made.content)
    try:
        return _started(path, made.overrides, folder)
    except UserError as error:
        _check_message(str(error), made)
        return REFUSED, str(error)
    except Exception as error:
        error.add_note("; ".join(made.done))
        raise
    finally:
        if list(folder.glob(f"**/{CANARY}*")):
            raise AssertionError(f"executed: {made.done}")


def _started(path: Path, overrides: Sequence[str], folder: Path) -> tuple[str, str]:
    config = load_config(path, overrides)
    for world_size in _WORLDS:
        # Rank 1 prints no table; indexes of sets made elsewhere stay in the trial's folder.
        os.environ.update(WORLD_SIZE=str(world_size), RANK="1", FASTTRAIN_CACHE=str(folder / "cache"))
        dry_run(config)
    index = read_index(Path(config.data.train))
    config = resolve(config, index)
    identity(config, index)
    _check_accepted(config)
    if (folder / config.run_dir).resolve().is_relative_to(folder):
        write_folder(config, index, _ALONE)
    return ACCEPTED, ""


def _check_accepted(config: RunConfig) -> None:
    """What was accepted can be written and read again, and is fine with DeepSpeed and with the process group."""
    from datetime import timedelta

    from deepspeed.comm.config import DeepSpeedCommsConfig
    from deepspeed.runtime.config import get_communication_data_type
    from deepspeed.runtime.zero.config import get_zero_config

    again = parse_config(yaml.safe_load(yaml.safe_dump(config.plain(), sort_keys=False)), "again")
    assert again == config, "what was written into the run folder is not what was read"
    settings = config.deepspeed_settings()
    get_zero_config(settings)
    get_communication_data_type(settings)
    DeepSpeedCommsConfig(settings)
    timedelta(seconds=config.training.timeout_seconds)
    assert all(
        map(torch.isfinite, torch.tensor([config.optimizer.rate(step, config.training.steps) for step in (1, config.training.steps)]))
    )


def _check_message(message: str, made: Mutant) -> None:
    """One message that names a key or a file, that a terminal can show, and that can be read."""
    assert _NAMED.search(message), f"names neither key nor file: {message[:300]!r}"
    assert len(message) < 6000, f"{len(message)} characters: {message[:300]!r}"
    assert all(line.isprintable() for line in message.split("\n")), f"control characters: {message[:300]!r}"
