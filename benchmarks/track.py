"""Compares a new result with the committed one of the same device, and fails on a regression.

    python -m benchmarks.track NEW.json [--baseline FILE] [--allowance 0.03]

A time has regressed when its whole bootstrap interval lies above the committed one's, by more than the allowance: the intervals know
how much runs of one process differ, not how much two processes do. A case that had a time and now ends in an error, or is gone, counts
as a regression too; one that the new stage had no time for is told and passed over.

Exit status: 0, compared and nothing has regressed; 1, something has, and each is named; 2, nothing could be compared (no committed
result of this device and benchmark, or other settings): a check that was not made does not pass.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.environment import RESULTS

REGRESSED, INCOMPARABLE = 1, 2
ALLOWANCE = 0.03
DIFFERENT_EFFORT = frozenset({"rounds", "repeats", "digest", "steps", "models", "batches", "limit"})
"""Settings that say how much was measured, and not what."""


class Comparison(NamedTuple):
    """What became of the committed times."""

    regressed: list[str]
    lost: list[str]
    not_run: list[str]
    compared: int


class Incomparable(Exception):
    """There is nothing to compare the result with."""


def times(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every time in a result that has an interval, by the case's name and its place within the case."""
    return {f"{name_of(case)}: {place}": seconds for case in result["cases"] for place, seconds in _times(case, "")}


def name_of(case: dict[str, Any]) -> str:
    """A case's name in words."""
    return ", ".join(f"{key} {value}" for key, value in case["case"].items())


def _times(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict):
        return
    if "median" in value.get("seconds", ()) and "interval" in value["seconds"]:
        yield place.strip(" "), value["seconds"]
    for key, inner in value.items():
        if key != "seconds":
            yield from _times(inner, f"{place} {key}")


def compare(new: dict[str, Any], old: dict[str, Any], allowance: float = ALLOWANCE) -> Comparison:
    """The new result against the committed one.

    Raises:
        Incomparable: another benchmark, device or settings; or not one time in common.
    """
    _require_alike(new, old)
    before, after = times(old), times(new)
    skipped = [name_of(case) for case in new["cases"] if "not_run" in case]
    covered = {name_of(case) for case in new["cases"]}
    shared = before.keys() & after.keys()
    missing = sorted(name for name in before.keys() - after.keys() if not name.startswith(tuple(f"{case}:" for case in skipped)))
    if new["settings"].get("digest"):
        # A digest measures fewer cases than a full run; those it took must still have all their times.
        missing = [name for name in missing if name.startswith(tuple(f"{case}:" for case in covered))]
    if not shared and not missing:
        raise Incomparable("the two results have no time in common")
    regressed = []
    for name in sorted(shared):
        low, high = after[name]["interval"][0], before[name]["interval"][1]
        if low > high * (1 + allowance):
            change = after[name]["median"] / before[name]["median"] - 1
            regressed.append(f"{name}: {before[name]['median']:.4g} s before, {after[name]['median']:.4g} s now (+{change:.1%})")
    return Comparison(regressed, missing, skipped, len(shared))


def _require_alike(new: dict[str, Any], old: dict[str, Any]) -> None:
    for key, ours, theirs in (
        ("benchmark", new["benchmark"], old["benchmark"]),
        ("device", new["environment"]["device"], old["environment"]["device"]),
        ("settings", *({k: v for k, v in r["settings"].items() if k not in DIFFERENT_EFFORT} for r in (new, old))),
    ):
        if ours != theirs:
            raise Incomparable(f"the {key} differ: {ours} now, {theirs} committed")


def committed(new: dict[str, Any], name: str) -> Path:
    """The committed result of this device.

    Raises:
        Incomparable: there is none.
    """
    device = new["environment"]["device"]
    folder = RESULTS / device
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in RESULTS.iterdir() if path.is_dir()))
        raise Incomparable(f"no result of {device} is committed (there are: {known})")
    if not (folder / name).is_file():
        raise Incomparable(f"{folder.name}/{name} is not committed")
    return folder / name


def main(arguments: list[str] | None = None) -> int:
    """Compares, and tells. The exit status is in the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("--baseline", type=Path, help="default: the committed result of the same device and name")
    parser.add_argument("--allowance", type=float, default=ALLOWANCE)
    args = parser.parse_args(arguments)
    new = json.loads(args.new.read_text())
    try:
        baseline = args.baseline or committed(new, args.new.name)
        found = compare(new, json.loads(baseline.read_text()), args.allowance)
    except Incomparable as reason:
        print(f"not compared: {reason}")
        return INCOMPARABLE
    for name in found.not_run:
        print(f"not run this time: {name}")
    for name in found.lost:
        print(f"lost: {name}")
    for line in found.regressed:
        print(f"regressed: {line}")
    print(f"{found.compared} times compared, {len(found.regressed)} regressed, {len(found.lost)} lost")
    return REGRESSED if found.regressed or found.lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
