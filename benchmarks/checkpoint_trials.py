"""What a run makes of a mutated checkpoint: read for samples, and resumed; whatever is used must be what was saved."""

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.checkpoint_mutants import CANARY, break_checkpoint
from benchmarks.checkpoint_scene import DAMAGE, FORGERY, UNFINISHED, Scene
from fasttrain.checkpoint import Checkpoints, Manifest, newest_sound, read_weights
from fasttrain.config import parse_config
from fasttrain.data.prepare.digits import prepare_digits
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.trained import Trained
from fasttrain.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import plain_config, zero

STEPS, EVERY = 6, 3
FELL_BACK, REFUSED, UNHARMED, FORGED = "fell back, told", "refused", "what was saved", "forgery taken"
State = dict[str, dict[str, Tensor]]


class Runs(NamedTuple):
    """Two runs of two ranks each, with checkpoints of steps 3 and 6."""

    mine: Path
    stranger: Path
    digits: Path


def make_runs(folder: Path) -> Runs:
    """Trains them."""
    prepare_digits(folder / "digits")
    runs = Runs(folder / "mine", folder / "stranger", folder / "digits")
    for path, seed in ((runs.mine, 0), (runs.stranger, 1)):
        run_ranks(2, _train, {**_config(path, runs.digits), "seed": seed})
    return runs


def _config(run_dir: Path, digits: Path) -> dict[str, Any]:
    model = {"name": "vit", "depth": 1, "width": 16, "heads": 2, "patch": 4, "num_timesteps": 1000}
    training = {"steps": STEPS, "global_batch": 4}
    return plain_config(run_dir, digits, model=model, training=training, checkpoint={"every": EVERY}, deepspeed=zero(2))


def _train(processes: Processes, raw: dict[str, Any]) -> None:
    assert Trainer(parse_config(raw, "mutations"), processes).fit()


def checkpoint_trial(number: int, folder: Path, *, seed: int, runs: Runs) -> tuple[str, str]:
    """One mutated checkpoint, read for samples and resumed, in a copy of its run: number -1 reads the sound one."""
    run = Path(shutil.copytree(runs.mine, folder / "run"))
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    older = newest.with_name(f"step-{EVERY:08d}")
    stranger = runs.stranger / "checkpoints" / newest.name
    kind, done = break_checkpoint(Scene(newest, older, stranger), seed, number) if number >= 0 else (DAMAGE, "nothing")
    try:
        outcomes = [_attempt(read, run, runs, kind) for read in (_sampled, _resumed)]
        assert not list(folder.glob(f"**/{CANARY}")), "executed"
    except Exception as error:
        error.add_note(f"{kind}: {done}")
        raise
    worst = outcomes[0] if outcomes[0] == outcomes[1] else " / ".join(outcomes)
    return worst, f"{kind}: {done}"


def _attempt(read: Any, run: Path, runs: Runs, kind: str) -> str:
    """Reads it; holds what was read to what may follow from this kind of change."""
    try:
        step, state, told = read(run, runs)
    except UserError as error:
        message = str(error)
        assert "checkpoint" in message or "run_dir" in message, message
        assert len(message) < 6000 and all(line.isprintable() for line in message.split("\n")), message
        return REFUSED
    saved = _saved(runs)[step]
    if all(torch.equal(saved[key][name], tensor) for key, tensors in state.items() for name, tensor in tensors.items()):
        if step == STEPS:
            assert kind in (DAMAGE, UNFINISHED, FORGERY), f"{kind} was not noticed"
            return UNHARMED
        assert kind == UNFINISHED or (told and "step-" in told[0] and all(line.isprintable() for line in told)), (
            f"fell back without a word: {told}"
        )
        return FELL_BACK
    assert kind == FORGERY, f"{kind}: what was read is not what was saved"
    return FORGED


def _sampled(run: Path, runs: Runs) -> tuple[int, State, list[str]]:
    """As `fasttrain sample` reads it: the masters and the average."""
    trained = Trained.load(run, "ema", torch.device("cpu"))
    folder, manifest, passed_over = newest_sound(run)
    masters = read_weights(folder, manifest, "master")
    averages = {name: p.detach() for name, p in trained.network.named_parameters() if name in masters}
    return manifest.progress.step, {"master": masters, "ema": averages}, passed_over


def _resumed(run: Path, runs: Runs) -> tuple[int, State, list[str]]:
    """As `fasttrain train` resumes it, on one rank under ZeRO 1."""
    trainer = _trainer(runs)
    trainer.checkpoints = Checkpoints(run, trainer.processes)
    found = trainer.find_checkpoint()
    assert found is not None
    folder, manifest, passed_over = found
    trainer.checkpoints.load(trainer.state, folder, manifest)
    return manifest.progress.step, {key: trainer.state.full(key) for key in trainer.state.keys}, passed_over


@functools.cache
def _trainer(runs: Runs) -> Trainer:
    """One trainer a process: what is loaded into it is everything it holds."""
    raw = {**_config(runs.mine, runs.digits), "deepspeed": zero(1)}
    return Trainer(parse_config(raw, "mutations"), distributed.start(60))


@functools.cache
def _saved(runs: Runs) -> dict[int, State]:
    """What the sound checkpoints hold, by step."""
    found = {}
    for step in (EVERY, STEPS):
        folder = runs.mine / "checkpoints" / f"step-{step:08d}"
        manifest = Manifest.read(folder)
        found[step] = {key: read_weights(folder, manifest, key) for key in manifest.states}
    return found
