"""Fills the README's tables and pictures from the committed results, between markers, so that no figure is typed.

    python -m benchmarks.report [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; whatever was there is replaced. Pictures are drawn anew beside their
JSON. With `--check` nothing is written, and the exit status is 1 if the README or a picture is out of date.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import (
    convergence_tables,
    fault_tables,
    miniature_tables,
    plots,
    proof_tables,
    tables,
    targets,
    task_view_tables,
    two_host_table,
)
from benchmarks.environment import RESULTS, ROOT

README = ROOT / "README.md"
MARKED = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)

COMPARISONS = (
    "digits-smoke",
    "digits-smoke-seeds",
    "digits",
    "digits-full",
    "gamma",
    "strategies",
    "recipe-screen",
    "recipe",
    "quickstart",
    "cifar10",
    "cifar10-cpu",
    "imagenet256",
)

TABLES: dict[str, Callable[[Path], str]] = {
    "targets": targets.table,
    "kernels": tables.kernels,
    "step": tables.step,
    "tests": tables.tests,
    "static": proof_tables.static,
    "errors": proof_tables.errors,
    "noise": proof_tables.noise,
    "parity": tables.parity,
    "loader": tables.loader,
    "waits": tables.waits,
    "checkpoint": tables.checkpoint,
    "two_hosts": two_host_table.two_hosts,
    "kills": fault_tables.kills,
    "faults": fault_tables.faults,
    "useful": fault_tables.useful,
    "size_control": miniature_tables.size_control,
    "text_to_image": miniature_tables.text_to_image,
    "resolution_transfer": miniature_tables.resolution_transfer,
    "task-view": task_view_tables.task_view,
    **{f"convergence-{name}": partial(convergence_tables.convergence, name) for name in COMPARISONS},
}
PICTURES: dict[str, Callable[[plots.Result], str]] = {
    "kernels": plots.kernel_bars,
    "step": plots.step_bars,
    "parity": plots.parity_lines,
}


class UnknownTable(Exception):
    """A marker names a table that nothing makes."""


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with every marked table made from the results.

    Raises:
        UnknownTable: a marker's name is none of TABLES.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise UnknownTable(f"the README has a marker for the table {name!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name](results)}\n<!-- end -->"

    return MARKED.sub(replaced, text)


def pictures(results: Path = RESULTS) -> dict[Path, str]:
    """Every picture that belongs beside a committed result."""
    found = {}
    for name, draw in PICTURES.items():
        for path in sorted(results.glob(f"*/{name}.json")):
            found[path.with_suffix(".svg")] = draw(json.loads(path.read_text()))
    return found


def outdated(readme: Path = README, results: Path = RESULTS) -> list[str]:
    """What does not show the committed results: the README, pictures."""
    text = readme.read_text()
    stale = [] if filled(text, results) == text else [readme.name]
    return stale + [str(path.name) for path, drawn in pictures(results).items() if not path.exists() or path.read_text() != drawn]


def main(arguments: list[str] | None = None) -> int:
    """Writes, or checks. The exit status is 1 when something was out of date and was not to be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    args = parser.parse_args(arguments)
    stale = outdated()
    if args.check:
        for name in stale:
            print(f"out of date: {name}; run: python -m benchmarks.report")
        return int(bool(stale))
    for path, drawn in pictures().items():
        path.write_text(drawn)
    README.write_text(filled(README.read_text()))
    print(f"written: {', '.join(stale) or 'nothing, all up to date'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
