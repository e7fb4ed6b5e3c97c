"""What the README says can be typed, and what it names is there."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttrain.cli import _parse
from fasttrain.config import load_config
from fasttrain.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def _commands() -> list[list[str]]:
    """The arguments of every `fasttrain` in a block, however it is launched, with continued lines joined."""
    lines = [line for language, block in BLOCKS if not language for line in block.replace("\\\n", " ").splitlines()]
    typed = [shlex.split(line, comments=True) for line in lines if line.startswith(("fasttrain ", "deepspeed "))]
    return [words[words.index("fasttrain") + 1 :] for words in typed]


@pytest.mark.parametrize("arguments", _commands(), ids=" ".join)
def test_commands_are_understood(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = _parse(arguments)
    if args.command == "train":
        load_config(args.config, args.overrides)


def test_there_are_commands_for_each_stage() -> None:
    assert {"prepare", "train", "sample", "export"} <= {arguments[0] for arguments in _commands()}


def test_files_it_names_exist() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    named = [name for name in re.findall(r"`((?:tests|configs|benchmarks|kernels|fasttrain)/[\w./-]*)`", README)]
    assert linked and named
    assert not [name for name in [*linked, *named] if not (ROOT / name).exists()]


def test_headings_it_links_to_exist() -> None:
    linked = re.findall(r"\]\(#([^)]+)\)", README)
    headings = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)]
    assert linked and not {*linked} - {*headings}


def test_each_file_of_the_package_has_its_place_in_the_tree() -> None:
    [tree] = [block for language, block in BLOCKS if block.startswith("kernels/fasttrain_kernels/")]
    files = [path for folder in ("fasttrain", "kernels/fasttrain_kernels") for path in (ROOT / folder).glob("*.py")]
    assert not [path.name for path in files if not path.name.startswith("__") and path.name not in tree]


def test_the_weighting_it_shows_works() -> None:
    [code] = [block for language, block in BLOCKS if language == "python"]
    registry = Registry("weighting")
    exec(code, {"WEIGHTINGS": registry, "dataclass": dataclass, "Tensor": Tensor})
    weighting = registry.build({"name": "debiased", "power": 0.5})
    torch.testing.assert_close(weighting(torch.tensor([0.0, 4.0])), torch.tensor([0.0, 2.0]))
