"""A thousand damaged shards: none may crash or hang, each loss is counted exactly, and no label stands on another's image.

    python -m benchmarks.damage [--count 1000] [--seed 0] [--minutes 10]

Each image says in its pixels which it is. A trial damages the middle one of three shards in one of fourteen ways and reads the set through.

    prepared            half of the trials: what is readable must be exactly the samples whose bytes are as they were
    foreign, indexed before the damage      the same
    foreign, indexed after it               every sample whose bytes are whole at a tar's block boundary must be seen; the loss that is
                                            told must be the real one (sizes.json says what there was). A tar has no digest of contents:
                                            what decodes is taken as it is, also a label whose own bytes were changed.

Last, one shard of each of the first two kinds is cut at 50 places, and the samples lost are counted.
"""

import argparse
import json
import logging
import re
import shutil
import signal
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.damaged_shards import BLOCK, KINDS, Content
from benchmarks.environment import ROOT, environment
from benchmarks.whole_file import write_json
from fasttrain.data.config import DataConfig
from fasttrain.data.foreign.decode import decode
from fasttrain.data.index import Source
from fasttrain.data.prepare.assembly import prepare_set
from fasttrain.data.prepare.plan import Plan
from fasttrain.data.prepare.writer import Made
from fasttrain.data.shards import ShardSet
from tests.labelled_images import CLASSES, SIDE, encoded, label_of, pixels, told_apart, write_set

RESULT = ROOT / "benchmarks" / "results" / "cpu" / "damage.json"
PREPARED, BEFORE, AFTER = "prepared", "foreign, indexed before", "foreign, indexed after"
COUNTS = (9, 12, 10)
ENDINGS = ("png", "jpg", "npy")
_SECONDS = 30


class Outcome(NamedTuple):
    """Of a trial: samples lost, and what went wrong."""

    lost: int
    faults: list[str]


class Sound:
    """A sound set: its folder, the middle shard, and where each of its samples lies there, as Python's tarfile tells."""

    def __init__(self, folder: Path, kind: str):
        self.kind, self.folder = kind, folder
        self.tar = sorted(folder.glob("*.tar"))[1]
        self.content = self.tar.read_bytes()
        with tarfile.open(self.tar) as tar:
            members = tar.getmembers()
        images = [member for member in members if not member.name.endswith("cls")]
        # The array alone is what a prepared set verifies, the whole image file what a foreign one does.
        self.images = [
            (m.offset_data + (128 if kind == PREPARED else 0), m.offset_data + m.size) for m in images
        ]  # fmt: skip
        starts = [member.offset for member in members[::2]]
        ends = [m.offset_data + -(-m.size // BLOCK) * BLOCK for m in members[1::2]]
        self.whole = list(zip(starts, ends, strict=True))
        self.first = COUNTS[0]
        self.shown = {decode(encoded(n, ENDINGS[n % 3]), n % 3 == 2, SIDE).tobytes(): n for n in range(sum(COUNTS))}

    def untouched(self, damaged: Content) -> set[int]:
        """The samples of the shard whose image bytes are where and as they were."""
        damaged = damaged or b""
        return {row for row, (start, end) in enumerate(self.images) if damaged[start:end] == self.content[start:end]}

    def intact(self, damaged: Content) -> set[int]:
        """The samples whose members, headers and padding included, stand somewhere at a block boundary."""
        damaged = damaged or b""
        return {row for row, (start, end) in enumerate(self.whole) if _stands(damaged, self.content[start:end])}


def _stands(content: bytes, part: bytes) -> bool:
    at = content.find(part)
    while at >= 0 and at % BLOCK:
        at = content.find(part, at + 1)
    return at >= 0


def make_sets(folder: Path) -> dict[str, Sound]:
    """A prepared and a foreign set of the same images."""

    def made(entries: Sequence[int]) -> Iterator[Made]:
        yield from (Made(str(entry), (pixels(entry), label_of(entry))) for entry in entries)

    plan = Plan(
        kind="image",
        shape=(3, SIDE, SIDE),
        dtype="uint8",
        classes=tuple(map(str, range(CLASSES))),
        source=Source(name="labelled", xxh3="0" * 32),
        entries=range(sum(COUNTS)),
        shard_size=-(-sum(COUNTS) // 3),
    )
    prepare_set(folder / "prepared", plan, made)
    foreign = write_set(folder / "foreign", COUNTS, ENDINGS)
    sizes = {path.name: count for path, count in zip(sorted(foreign.glob("*.tar")), COUNTS, strict=True)}
    (foreign / "sizes.json").write_text(json.dumps(sizes))
    return {PREPARED: Sound(folder / "prepared", PREPARED), BEFORE: Sound(foreign, BEFORE), AFTER: Sound(foreign, AFTER)}


def run_trial(sound: Sound, damaged: Content, folder: Path) -> Outcome:
    """Puts a damaged shard into a copy of a set, reads the set through, and judges what came."""
    copy = folder / "set"
    shutil.copytree(sound.folder, copy)
    config = DataConfig(train=str(copy), size=SIDE, max_damaged=1, retry_seconds=0, cache=str(folder / "cache"))
    try:
        if sound.kind == BEFORE:
            ShardSet.open(copy, config)
        if damaged is None:
            (copy / sound.tar.name).unlink()
        else:
            (copy / sound.tar.name).write_bytes(damaged)
        with _within(_SECONDS), _listening() as told:
            return (_judge_after if sound.kind == AFTER else _judge)(sound, damaged, config, told)
    except Exception as error:
        return Outcome(0, [f"{type(error).__name__}: {error}"])
    finally:
        shutil.rmtree(folder)


def _judge(sound: Sound, damaged: Content, config: DataConfig, told: list[str]) -> Outcome:
    """What is readable is exactly what is untouched; all that is, is what it was; and the ledger says the same."""
    shards = ShardSet.open(config.train, config)
    found = shards.gather(np.arange(len(shards)))
    first, count = sum(shards.index.shard_samples[:1]), shards.index.shard_samples[1]
    wanted = np.ones(len(shards), bool)
    wanted[first : first + count] = [row in sound.untouched(damaged) for row in range(count)]
    lost = int((~wanted).sum())
    faults = [] if np.array_equal(found.readable, wanted) else [f"readable {found.readable.sum()}, untouched {wanted.sum()}"]
    faults += _mislabelled(found.arrays[found.readable], found.labels[found.readable])
    if shards.damage.unreadable != lost or sum(each.unreadable for each in shards.damage.news()) != lost:
        faults.append(f"{shards.damage.unreadable} counted, {lost} lost")
    return Outcome(lost, faults)


def _judge_after(sound: Sound, damaged: Content, config: DataConfig, told: list[str]) -> Outcome:
    """All that is whole is seen; what is indexed and told makes up what there was."""
    shards = ShardSet.open(config.train, config)
    found = shards.gather(np.arange(len(shards)))
    # By all their pixels: damage that still decodes may show any number.
    shown = [
        (sound.shown.get(image.tobytes()), label)
        for image, label in zip(found.arrays[found.readable], found.labels[found.readable], strict=True)
    ]
    seen = {number: label == label_of(number) for number, label in shown if number is not None}
    first = sound.first
    wanted = {*range(first), *range(first + COUNTS[1], sum(COUNTS)), *(first + row for row in sound.intact(damaged))}
    faults = [f"whole, but not seen: {sorted(wanted - seen.keys())}"] if wanted - seen.keys() else []
    wrong = [number for number in wanted & seen.keys() if not seen[number]]
    faults += [f"labels of others on {wrong}"] if wrong else []
    indexed = dict(zip((s.file for s in shards.index.shards), shards.index.shard_samples, strict=True)).get(sound.tar.name)
    expected = None if damaged is None else COUNTS[1]
    lines = [line for line in told if sound.tar.name in line]
    if indexed is not None and indexed != expected:
        if not any(re.search(rf"holds {indexed} samples that can be used, where its maker wrote {COUNTS[1]}", line) for line in lines):
            faults.append(f"{indexed} of {COUNTS[1]} indexed, and that is not told: {lines}")
    elif indexed is None and not any("missing" in line for line in lines):
        faults.append("a missing shard is not told")
    return Outcome(COUNTS[1] - (indexed or 0) + shards.damage.unreadable, faults)


def _mislabelled(arrays: np.ndarray, labels: np.ndarray) -> list[str]:
    wrong = [number for number, own in told_apart(arrays, labels) if not own]
    return [f"labels of others on {wrong}"] if wrong else []


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _listening() -> Iterator[list[str]]:
    """The warnings told inside the block."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("fasttrain.data")
    log.addHandler(handler)
    log.propagate, before = False, log.propagate
    try:
        yield told
    finally:
        log.removeHandler(handler)
        log.propagate = before


def trials(sets: dict[str, Sound], count: int, seed: int, scratch: Path) -> Iterator[tuple[str, str, Outcome]]:
    """Set, way and outcome of each trial; half of them are on the prepared set."""
    ways = list(KINDS)
    for number in range(count):
        kind = (PREPARED, BEFORE, PREPARED, AFTER)[number % 4]
        way = ways[number // 4 % len(ways)]
        damaged = KINDS[way](np.random.default_rng((seed, number)), sets[kind].content)
        yield kind, way, run_trial(sets[kind], damaged, scratch / str(number))


def cuts(sets: dict[str, Sound], seed: int, scratch: Path) -> dict[str, dict[str, int]]:
    """50 cuts of one shard: how often the samples lost were counted exactly, and no label was another's."""
    rows = {}
    for kind in (PREPARED, BEFORE):
        places = np.random.default_rng(seed).integers(0, len(sets[kind].content), 50)
        outcomes = [run_trial(sets[kind], sets[kind].content[:place], scratch / f"{kind}-{i}") for i, place in enumerate(places)]
        exact = sum(not outcome.faults for outcome in outcomes)
        rows[kind] = {"cuts": 50, "exact": exact, "lost": sum(outcome.lost for outcome in outcomes)}
    return rows


def main() -> None:
    """Runs the trials, prints the table and the faults, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so long; what was not tried is told")
    args = parser.parse_args()
    began = time.monotonic()
    table: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    tried, faults = 0, []
    with tempfile.TemporaryDirectory() as folder:
        sets = make_sets(Path(folder))
        for kind, way, outcome in trials(sets, args.count, args.seed, Path(folder)):
            tried += 1
            table[way][kind] += Counter(shards=1, lost=outcome.lost, wrong=bool(outcome.faults))
            faults += [f"{kind}, {way}, trial {tried - 1}: {fault}" for fault in outcome.faults]
            if time.monotonic() - began > 60 * args.minutes:
                break
        cut = cuts(sets, args.seed, Path(folder))
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "settings": {"count": args.count, "seed": args.seed, "seconds": round(time.monotonic() - began, 1)},
        "tried": tried,
        "not_tried": args.count - tried,
        "faults": len(faults),
        "ways": table,
        "cut_at_50_places": cut,
    }
    write_json(RESULT, result)
    _print(result, faults)
    if faults or any(row["exact"] < row["cuts"] for row in cut.values()):
        raise SystemExit(1)


def _print(result: dict[str, Any], faults: list[str]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    title = f"{result['tried']} damaged shards, {result['not_tried']} not tried: shards / samples lost / wrong"
    table = Table("damage", PREPARED, BEFORE, AFTER, title=title)
    for way, kinds in result["ways"].items():
        cells = [f"{c['shards']} / {c['lost']} / {c['wrong']}" for c in (kinds[kind] for kind in (PREPARED, BEFORE, AFTER))]
        table.add_row(KINDS[way].__doc__, *cells)
    console.print(table)
    for kind, row in result["cut_at_50_places"].items():
        console.print(f"{kind}: cut at {row['cuts']} places, {row['exact']} times counted exactly ({row['lost']} samples lost in all)")
    for fault in faults[:20]:
        console.print(fault)


if __name__ == "__main__":
    main()
