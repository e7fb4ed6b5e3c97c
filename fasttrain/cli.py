"""The command line: `fasttrain prepare | train | replay | sample | evaluate | analyse | export | doctor`."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from fasttrain.engine.launch import rank
from fasttrain.errors import Status, UserError

# Sub-command -> (module with add_arguments and run, what it does). Imported only when asked for: `--help` should not wait for torch.
COMMANDS = {
    "train": ("fasttrain.commands.train", "train a run, or continue it"),
    "sample": ("fasttrain.commands.sample", "draw images from a run"),
    "evaluate": ("fasttrain.commands.evaluate", "score a run against real images"),
    "evaluate train-extractor": ("fasttrain.commands.train_extractor", "train a classifier of a set, for scores to compare what it sees"),
    "export": ("fasttrain.commands.export", "write a run's weights as a safetensors file or a folder of diffusers"),
    "replay": ("fasttrain.commands.replay", "take one step of a run again, and tell everything about it"),
    "doctor": ("fasttrain.commands.doctor", "tell what this machine has, and what training here will use"),
    "supervise": ("fasttrain.commands.supervise", "run a launcher's command, and start it again when a process, node or link was lost"),
}
SOURCES = {
    "digits": ("fasttrain.data.prepare.digits", "scikit-learn's 1,797 handwritten digits"),
    "images": ("fasttrain.data.prepare.images", "a tree of class folders, a tar of one, or WebDataset shards"),
    "latents": ("fasttrain.data.prepare.latents", "the same, encoded by a VAE"),
    "text": ("fasttrain.data.prepare.text", "the captions of a set, encoded by a text encoder"),
}
ANALYSES = {
    "gradients": ("fasttrain.commands.analyses.gradients", "how the gradients of timestep ranges agree and conflict"),
    "pareto": ("fasttrain.commands.analyses.pareto", "how near each weighting comes to the Pareto optimum of its gradients"),
    "instability": ("fasttrain.commands.analyses.instability", "how UGD's weights vary with the samples behind them, and what they cost"),
    "ranges": ("fasttrain.commands.analyses.ranges", "the unweighted loss of each timestep range over training"),
    "finetune": ("fasttrain.commands.analyses.finetune", "what training on one range of timesteps does to all others"),
    "consistency": ("fasttrain.commands.analyses.consistency", "how alike several models' images from the same noise are"),
    "interpolate": ("fasttrain.commands.analyses.interpolate", "the loss on the straight line between two checkpoints or runs"),
    "hessian": ("fasttrain.commands.analyses.hessian", "the spectrum of the loss's Hessian, by Lanczos' method"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: see `errors.Status`."""
    # Threads that spin at each other's barriers slow a CPU run ninefold when anything else wants a core. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    args = _parse(given)
    try:
        status = importlib.import_module(args.module).run(args)
    except (UserError, OSError) as error:
        told = _told(error)
        if args.debug or told is None:
            raise
        # Before the ranks have joined, all meet the same mistake and rank 0 tells it.
        if not getattr(error, "told_elsewhere", rank(os.environ) != 0):
            print(f"fasttrain: {told}", file=sys.stderr)
        return getattr(error, "status", Status.USER_ERROR)
    return Status.DONE if status is None else status


def _told(error: UserError | OSError) -> str | None:
    """What to tell the user: a full disk can be met anywhere; any other OSError is not theirs to mend."""
    if isinstance(error, UserError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left{f' for {error.filename}' if error.filename else ''}: free some and run the same command again"
    return None


def _parse(given: list[str]) -> argparse.Namespace:
    """The arguments; overrides may also follow options, which argparse alone takes for unknown."""
    given = _joined(given)
    parser = _parser(given)
    args, rest = parser.parse_known_args(given)
    strangers = [argument for argument in rest if argument.startswith("-") or "=" not in argument or not hasattr(args, "overrides")]
    if strangers:
        parser.error(f"unknown arguments: {' '.join(strangers)}; see fasttrain {args.command} --help")
    if rest:
        args.overrides += rest
    return args


def _joined(given: list[str]) -> list[str]:
    """A command of two words as one: `evaluate RUN` takes a folder where `evaluate train-extractor` has its second word."""
    return [" ".join(given[:2]), *given[2:]] if " ".join(given[:2]) in COMMANDS else given


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The launchers put `--local_rank=N` before the sub-command; what it says is in the environment as well."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--local_rank", "--local-rank", type=int)
    own, behind = _divided(arguments)
    known, rest = launcher.parse_known_args(own)
    if known.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(known.local_rank))
    return rest + behind


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and from `--` on those of a command that is only passed on."""
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    return given[:end], given[end:]


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fasttrain", description="Trains diffusion transformers to a given image quality in the least GPU time."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="turn images into shards, and their captions into text for training")
    sources = prepare.add_subparsers(dest="source", required=True, metavar="SOURCE")
    analyse = commands.add_parser("analyse", help="look at what a run learns: conflict between timesteps, Pareto weights and more")
    analyses = analyse.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    own, _ = _divided(given)
    for group, entries in ((commands, COMMANDS), (sources, SOURCES), (analyses, ANALYSES)):
        for name, (module, told) in entries.items():
            _add(group.add_parser(name, help=told, description=told), module, wanted=name in own)
    return parser


def _add(parser: argparse.ArgumentParser, module: str, wanted: bool) -> None:
    """A sub-command; its module is imported only when the command line names it."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.set_defaults(module=module)
    if wanted:
        importlib.import_module(module).add_arguments(parser)
