"""`fasttrain evaluate RUN --reference SHARDS`: how near a run's samples are to real images, a score for each of its weights and steps."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fasttrain.checkpoint import steps_of
from fasttrain.commands.destination import writing_to
from fasttrain.commands.generating import (
    TIMEOUT_SECONDS,
    Drawing,
    add_generation_arguments,
    check_steps,
    draw,
    guidance_of,
    loaded,
    sampler_of,
    tell_caution,
    wishes_of,
)
from fasttrain.data.config import DataConfig
from fasttrain.data.remote.store import cache_folder, check_address
from fasttrain.data.shards import ShardSet
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.engine.together import on_main, together
from fasttrain.errors import UserError
from fasttrain.evaluation import extractor, torchscript  # noqa: F401 (registered)
from fasttrain.evaluation.agreement import Agreement
from fasttrain.evaluation.collected import Collector, Statistics, chosen, statistics
from fasttrain.evaluation.evaluate import check_lengths, nearness, reference_statistics, score
from fasttrain.evaluation.extractor import Extractor
from fasttrain.evaluation.features import FEATURES, Features
from fasttrain.evaluation.kept import KeptStatistics
from fasttrain.evaluation.precision_recall import PrecisionRecall
from fasttrain.evaluation.protocol import Protocol, Score
from fasttrain.evaluation.reference import Reference, Shards, StatisticsFile
from fasttrain.registry import shown
from fasttrain.sampling import SAMPLERS
from fasttrain.trained import UNTRAINED, Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser, count=10_000)
    parser.add_argument(
        "--weights", nargs="+", default=["ema"], help="ema, ema_1 ..., raw, or untrained; several give a score each (default ema)"
    )
    parser.add_argument(
        "--checkpoint-steps", nargs="+", default=[], metavar="STEP", help="kept checkpoints, or `all`: a score each (default: the newest)"
    )
    parser.add_argument(
        "--reference",
        required=True,
        help="folder or URL of image shards to compare with, a pattern of shards made elsewhere, or an npz of mu and sigma",
    )
    parser.add_argument("--size", type=int, help="of the images of shards made elsewhere: they are cropped and resized to it")
    parser.add_argument(
        "--features",
        nargs="+",
        default=["pixels"],
        metavar="NAME[=FILE]",
        help="what is compared: pixels, extractor=FILE (of `fasttrain evaluate train-extractor`), torchscript=FILE (such as FID's "
        "inception-2015-12-05.pt: a program, which is run); several give a score each (default pixels)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the scores, step-STEP-WEIGHTS-FEATURES.json each (default: RUN/scores)"
    )


def run(args: argparse.Namespace) -> None:
    given, folder, choices = _steps(args), _folder(args), _choices(args.features)
    with _reference(args) as reference, distributed.joined(TIMEOUT_SECONDS) as processes:
        kept = KeptStatistics(cache_folder(DataConfig(train=args.reference)) / "statistics")
        tell_caution(args, processes)
        opened = together(processes, lambda: {name: choice.open(processes.device) for name, choice in choices.items()})
        steps = processes.from_main(on_main(processes, lambda: steps_of(args.run) if given is None else given))
        ready: dict[str, Statistics | None] | None = None
        for weights, step in _asked(args.weights, steps):
            trained = loaded(args.run, weights, processes, step)
            drawing = draw(trained, args, processes, wishes_of(args))
            lengths = _lengths(reference, opened, drawing.shape)
            if ready is None:
                ready = {name: reference_statistics(reference, features, processes, kept) for name, features in opened.items()}
                _tell_left_out(reference, ready)
            on_main(processes, partial(_check_lengths, lengths, ready, opened, reference.name))
            on_main(processes, lambda: _make(folder))
            collected = _collected(args.count, trained, drawing, opened, processes)
            protocol = _protocol(args, trained, drawing, reference, processes.device)
            near = {name: nearness(collected[name].statistics if collected else None, ready[name], processes) for name in opened}
            on_main(processes, partial(_write_all, folder, weights, collected, ready, near, opened, protocol))


def _check_lengths(lengths: dict[str, int], ready: dict[str, Statistics | None], opened: dict[str, Features], reference: str) -> None:
    for name, theirs in ready.items():
        assert theirs is not None
        check_lengths(lengths[name], theirs, opened[name], reference)


def _write_all(
    folder: Path,
    weights: str,
    collected: dict[str, "_Collected"],
    ready: dict[str, Statistics | None],
    near: dict[str, PrecisionRecall | None],
    opened: dict[str, Features],
    protocol: Protocol,
) -> None:
    for name, (ours, agreement) in collected.items():
        theirs = ready[name]
        assert theirs is not None
        found = dataclasses.replace(score(ours, theirs, opened[name], protocol, near[name]), agreement=agreement)
        _write(folder, weights, name, found)


class _Collected(NamedTuple):
    """What a score needs of the samples, on rank 0."""

    statistics: Statistics
    agreement: dict[str, Any] | None


def _collected(count: int, trained: Trained, drawing: Drawing, opened: dict[str, Features], processes: Processes) -> dict[str, _Collected]:
    """The samples, made once, as all features see them. A collective; empty but on rank 0."""
    collectors = {name: Collector("samples", features) for name, features in opened.items()}
    judge = _judge(trained, drawing, opened)
    if processes.is_main:
        _tell_no_judge(judge, trained, drawing, opened)
    kept = chosen(count)

    def collect() -> Agreement | None:
        agreement = Agreement.none(len(judge.record.classes)) if judge else None
        for made in drawing.batches:
            for collector in collectors.values():
                collector.update(made.images, kept[made.numbers])
            if judge and agreement:
                assert made.labels is not None
                agreement += Agreement.of(made.labels, judge.classify(made.images), len(judge.record.classes))
        return agreement

    agreement = together(processes, collect)
    shares = processes.gather_to_main(({name: collector.share() for name, collector in collectors.items()}, agreement))
    return on_main(processes, lambda: _of_all(shares, judge, opened)) or {}


def _of_all(shares: list[Any], judge: Extractor | None, opened: dict[str, Features]) -> dict[str, _Collected]:
    told = sum((theirs for _, theirs in shares[1:]), shares[0][1]).told(judge.record.classes) if judge else None
    return {
        name: _Collected(statistics("samples", (share[name] for share, _ in shares)), told if features is judge else None)
        for name, features in opened.items()
    }


def _judge(trained: Trained, drawing: Drawing, opened: dict[str, Features]) -> Extractor | None:
    """The extractor that knows the classes that the samples are asked to show, all of them, if one is among the features."""
    found = _extractor(trained, drawing, opened)
    classes, told = trained.index.classes, trained.config.model.geometry()[2]
    return found if found and found.record.classes == tuple(classes) and len(classes) == told else None


def _extractor(trained: Trained, drawing: Drawing, opened: dict[str, Features]) -> Extractor | None:
    """The extractor among the features, where the samples are asked to show classes."""
    if drawing.asked.prompts is not None or not trained.config.model.geometry()[2]:
        return None
    return next((features for features in opened.values() if isinstance(features, Extractor)), None)


def _tell_no_judge(judge: Extractor | None, trained: Trained, drawing: Drawing, opened: dict[str, Features]) -> None:
    found = _extractor(trained, drawing, opened)
    if found and not judge:
        others, told = found.record.classes != tuple(trained.index.classes), trained.config.model.geometry()[2]
        why = "they are not those of the run's set" if others else f"the model is told {told}"
        print(f"agreement is not counted: the extractor tells {len(found.record.classes)} classes of {found.record.set} apart, and {why}")


def _asked(weights: Sequence[str], steps: Sequence[int]) -> list[tuple[str, int | None]]:
    """The weights and steps that are scored in turn; a network before its first step is scored once."""
    untrained: list[tuple[str, int | None]] = [(name, None) for name in weights if name == UNTRAINED]
    chosen: list[int | None] = [*steps] or [None]
    return list(dict.fromkeys([*untrained, *((name, step) for step in chosen for name in weights if name != UNTRAINED)]))


def _steps(args: argparse.Namespace) -> list[int] | None:
    """The steps that are asked for, none for the newest; None for all that there are."""
    check_steps("--checkpoint-steps", args.weights, args.checkpoint_steps)
    return None if args.checkpoint_steps == ["all"] else [*map(_step, args.checkpoint_steps)]


def _step(given: str) -> int:
    if not given.isdecimal():
        raise UserError(f"--checkpoint-steps {shown(given)}: give steps as numbers, or `all` alone")
    return int(given)


def _folder(args: argparse.Namespace) -> Path:
    if args.out is not None and args.out.suffix == ".json":
        raise UserError(f"--out {args.out}: it names a folder for the scores, a step-STEP-WEIGHTS-FEATURES.json each: give a folder's name")
    return args.out or args.run / "scores"


def _choices(given: Sequence[str]) -> dict[str, Any]:
    """The features that are asked for, by name."""
    choices: dict[str, Any] = {}
    for item in given:
        name, equals, file = item.partition("=")
        if name in choices:
            raise UserError(f"--features {shown(item)}: {name} is given twice; score the other file in a call of its own")
        try:
            choices[name] = FEATURES.build({"name": name, "file": file} if equals else name)
        except ValueError as error:
            raise UserError(f"--features {shown(item)}: {error}; files are named as in extractor=FILE") from None
    return choices


@contextmanager
def _reference(args: argparse.Namespace) -> Iterator[Reference]:
    """What is compared with, for as long as the block lasts."""
    check_address(args.reference)
    if args.reference.endswith(".npz"):
        if args.size is not None:
            raise UserError(f"--size {args.size}: {args.reference} holds statistics; --size is for shards made elsewhere: leave it out")
        yield StatisticsFile(Path(args.reference))
        return
    with closing(ShardSet.open(args.reference, DataConfig(train=args.reference, size=args.size))) as shards:
        if shards.index.layout == "arrays" and args.size not in (None, shards.index.pixels):
            told = f"{args.reference} was prepared at {shards.index.pixels} and is compared as it is; --size is for shards made elsewhere"
            raise UserError(f"--size {args.size}: {told}: leave it out, or prepare a reference with `fasttrain prepare images --size`")
        yield Shards(shards)


def _lengths(reference: Reference, opened: dict[str, Features], shape: tuple[int, int, int]) -> dict[str, int]:
    """How long each feature's vectors are. Raises UserError, before anything is sampled, where the images cannot be compared."""
    if reference.shape not in (None, shape):
        told = f"samples are images {shape}, the reference holds {reference.shape} (H, W, C)"
        raise UserError(f"--reference {reference.name}: {told}: give a reference of the same shape")
    return {name: features(np.zeros((1, *shape), np.uint8)).shape[1] for name, features in opened.items()}


def _protocol(args: argparse.Namespace, trained: Trained, drawing: Drawing, reference: Reference, device: torch.device) -> Protocol:
    return Protocol(
        reference=reference.name,
        reference_digest=reference.xxh3,
        reference_kind=reference.kind,
        checkpoint_step=trained.step,
        weights=trained.weights,
        sampler=SAMPLERS.spec(sampler_of(args)),
        guidance=guidance_of(args).plain(),
        conditions=drawing.asked.described(),
        seed=args.seed,
        vae=drawing.vae.model_dump(include={"id", "revision", "xxh3"}, exclude_none=True) if drawing.vae else None,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _make(folder: Path) -> None:
    """Before anything is sampled."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(folder: Path, weights: str, features: str, found: Score) -> None:
    step = found.protocol.checkpoint_step
    out = folder / f"step-{step:08d}-{weights}-{features}.json"
    with writing_to(folder):
        found.save(out)
    more = {"precision": found.precision, "recall": found.recall, "agreement": found.agreement and found.agreement["share"]}
    numbers = "".join(f", {name} {value:.3f}" for name, value in more.items() if value is not None)
    against = f"{found.reference_samples} reference images" if found.reference_samples else f"the statistics of {found.protocol.reference}"
    print(
        f"Frechet distance {found.frechet_distance:.4f}{numbers} ({features}; {found.samples} samples of the {found.protocol.weights} "
        f"weights at step {step}, {against}): {out}"
    )


def _tell_left_out(reference: Reference, ready: dict[str, Statistics | None]) -> None:
    left_out = max((found.left_out for found in ready.values() if found is not None), default=0)
    if left_out:
        print(f"{left_out} unreadable samples of {reference.name} are left out")
