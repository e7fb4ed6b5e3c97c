"""The README's tables of small whole experiments: size control, text to image, transfer across resolutions."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import read, table

Rows = tuple[list[str], list[list[str]]]
Result = dict[str, Any]
NOT_RUN = "*Not run.*"


def size_control(results: Path) -> str:
    """How far a sample moves when only its size control changes."""
    result = read(results / "cpu" / "size_control.json")
    return "\n".join(table(*size_control_rows(result))) if result else NOT_RUN


def text_to_image(results: Path) -> str:
    """How often a classifier sees what the caption says."""
    result = read(results / "cpu" / "text_to_image.json")
    return "\n".join(table(*text_to_image_rows(result))) if result else NOT_RUN


def resolution_transfer(results: Path) -> str:
    """Images needed to reach a distance, from scratch and from a network of half the resolution."""
    result = read(results / "cpu" / "resolution_transfer.json")
    return "\n".join(table(*resolution_transfer_rows(result))) if result else NOT_RUN


def size_control_rows(result: Result) -> Rows:
    """A row an arm: means over the seeds, and their range."""
    trials = result["trials"]
    rows = []
    for arm in dict.fromkeys(trial["arm"] for trial in trials):
        some = [trial for trial in trials if trial["arm"] == arm]
        distance, content = (_range([trial[key] for trial in some]) for key in ("distance", "content"))
        share = statistics.mean(trial["distance"] / trial["other_noise"] for trial in some)
        details = " / ".join(f"{1e3 * statistics.mean(t['detail'][size] for t in some):.1f}" for size in some[0]["detail"])
        agreement = " / ".join(f"{statistics.mean(t['agreement'][size] for t in some):.1%}" for size in some[0]["agreement"])
        mirrored = f"{statistics.mean(t['agreement_mirrored'] for t in some):.1%}"
        rows.append([arm, distance, content, f"{share:.1%}", details, agreement, mirrored])
    real = result["real"]
    details, sizes = " / ".join(f"{1e3 * value:.1f}" for value in real["detail"].values()), " / ".join(real["detail"])
    judge = f"{result['judge']['accuracy']:.1%} (the judge, on unseen digits)"
    rows.append(["real digits of these sizes", f"{real['distance']:.4f}", f"{real['content']:.4f}", "", details, judge, ""])
    head = ["weight of the size control", "distance", "content", "distance, of another noise's", f"detail x 1000 at {sizes}"]
    return [*head, f"agreement at {sizes}", "mirrored"], rows


def text_to_image_rows(result: Result) -> Rows:
    """A row a set of captions."""
    rows = [[name, str(found["samples"]), f"{found['agreement']:.1%}", _worst(found)] for name, found in result["captions"].items()]
    rows.append(["the judge itself, on unseen digits", str(result["judge"]["unseen"]), f"{result['judge']['accuracy']:.1%}", ""])
    return ["captions", "samples", "classifier agrees", "worst digit"], rows


def _worst(found: Result) -> str:
    digit = min(found["by_digit"], key=found["by_digit"].get)
    return f"{digit}: {found['by_digit'][digit]:.0%}"


def resolution_transfer_rows(result: Result) -> Rows:
    """A row an arm: its distance at the end, and the images it needed for each threshold."""
    thresholds = result["thresholds"]
    rows = []
    for name, arm in result["arms"].items():
        needed = [_images(count, arm) for count in arm["needed"]]
        rows.append([name, f"{arm['curve'][0][1]:.2f}", f"{arm['curve'][-1][1]:.2f}", *needed])
    first, last = (f"{result['arms'][next(iter(result['arms']))]['curve'][place][0]:,}" for place in (0, -1))
    head = ["16-pixel training", f"distance after {first} images", f"after {last}"]
    return [*head, *(f"images to {threshold:.2f}" for threshold in thresholds)], rows


def _images(count: float | None, arm: Result) -> str:
    if count is None:
        return f"not by {arm['curve'][-1][0]:,}"
    return f"at most {arm['curve'][0][0]:,}" if count <= arm["curve"][0][0] else f"{count:,.0f}"


def _range(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})"
