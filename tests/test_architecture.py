"""The house's rules, read off the source: who may import whom, and how long a file may be."""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("fasttrain/**/*.py"), *ROOT.glob("kernels/fasttrain_kernels/**/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# A module may import its own part and what is below it.
BASE = {"fasttrain.cond", "fasttrain.errors", "fasttrain.files", "fasttrain.registry", "fasttrain.tensor_file", "fasttrain.versions"}
FLOOR_1 = {"fasttrain.diffusion", "fasttrain.models", "fasttrain.data", "fasttrain.engine"}
FLOOR_2 = {"fasttrain.sampling", "fasttrain.evaluation", "fasttrain.research"}

# Outside packages that only these places may import (a folder ends in "/"), and whether a single file there may.
ONLY_IN = {
    "deepspeed": (("fasttrain/engine/",), True),
    "torch.distributed": (("fasttrain/engine/",), False),
    "apex": (("fasttrain/engine/",), True),
    "flash_attn": (("fasttrain/models/",), True),
    "diffusers": (("fasttrain/data/vae.py", "fasttrain/sampling/diffusers.py"), False),
    "torchvision": ((), False),
    "transformers": (("fasttrain/data/text/encoder.py",), True),
    "safetensors.torch": (("fasttrain/tensor_file.py",), True),  # which says what a failed write means
}
DRAWERS = {"utils", "util", "helpers", "helper", "misc", "common"}


def module_of(path: Path) -> str:
    """The dotted name by which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, lazy ones included; `from a import b` counts as `a.b`."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, parts: set[str]) -> str | None:
    """The part of the house a dotted name belongs to, if it is one of these."""
    return next((part for part in parts if name == part or name.startswith(part + ".")), None)


def allowed(importer: str, imported: str) -> bool:
    """Whether the floors let one of our modules import another."""
    if within(importer, {"fasttrain_kernels"}):
        return within(imported, {"fasttrain_kernels"}) is not None
    below = {"fasttrain_kernels", *BASE}
    if within(imported, below):
        return within(importer, BASE) is None or within(imported, BASE) is not None
    if within(importer, BASE) or importer == "fasttrain":
        return False
    floor_1, floor_2 = within(importer, FLOOR_1), within(importer, FLOOR_2)
    if floor_1:
        return within(imported, {floor_1}) is not None
    if floor_2:
        return within(imported, {floor_2, *FLOOR_1}) is not None
    return True  # a file directly in fasttrain/: the top floor


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_there_is_something_to_check():
    assert {"fasttrain/models/vit.py", "kernels/fasttrain_kernels/philox.py"} <= {str(path.relative_to(ROOT)) for path in SOURCES}


@pytest.mark.parametrize(
    ("importer", "imported", "fine"),
    [
        ("fasttrain.models.vit", "fasttrain.models.flops", True),
        ("fasttrain.models.dit", "fasttrain_kernels.adaln.adaln", True),
        ("fasttrain.models.dit", "fasttrain.diffusion.schedule", False),
        ("fasttrain.models.dit", "fasttrain.sampling.heun", False),
        ("fasttrain.data.loader", "fasttrain.config", False),
        ("fasttrain.sampling.heun", "fasttrain.diffusion.schedule", True),
        ("fasttrain.sampling.heun", "fasttrain.evaluation.frechet", False),
        ("fasttrain.registry", "fasttrain.models", False),
        ("fasttrain_kernels.adaln", "fasttrain.errors", False),
        ("fasttrain.trainer", "fasttrain.sampling.heun", True),
    ],
)
def test_the_rule_itself(importer, imported, fine):
    assert allowed(importer, imported) is fine


def test_imports_go_down():
    faults = [
        f"{where(path, line)}: {module_of(path)} must not import {name}: only its own part and lower floors"
        for path in SOURCES
        for line, name in imports_of(path)
        if within(name, {"fasttrain", "fasttrain_kernels"}) and not allowed(module_of(path), name)
    ]
    assert not faults, "\n".join(faults)


def test_the_kernels_need_only_torch_and_triton():
    known = {"torch", "triton", "fasttrain_kernels", *sys.stdlib_module_names}
    faults = [
        f"{where(path, line)}: fasttrain_kernels must not import {name}"
        for path in SOURCES
        for line, name in imports_of(path)
        if within(module_of(path), {"fasttrain_kernels"}) and name.split(".")[0] not in known
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("package", ONLY_IN)
def test_who_may_import(package):
    places, alone = ONLY_IN[package]
    importers = defaultdict(list)
    for path in SOURCES:
        for line, name in imports_of(path):
            if within(name, {package}):
                importers[str(path.relative_to(ROOT))].append(line)
    strangers = [f"{path}:{lines[0]}" for path, lines in importers.items() if not path.startswith(places)]
    assert not strangers, f"{package} may be imported only in {', '.join(places) or 'no file'}, but is in {', '.join(strangers)}"
    assert not alone or len(importers) <= 1, f"{package} has one importing file, but is imported in {', '.join(importers)}"


def test_no_file_is_a_drawer():
    faults = [str(path.relative_to(ROOT)) for path in [*SOURCES, *TESTS] if DRAWERS & {path.stem, *path.relative_to(ROOT).parent.parts}]
    assert not faults, f"name these by what they hold: {', '.join(faults)}"


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*SOURCES, *TESTS]}
    faults = [f"{path.relative_to(ROOT)}: {length} lines" for path, length in lengths.items() if length > 350]
    assert not faults, "past 350 lines a file holds two concepts, split it: " + ", ".join(faults)
