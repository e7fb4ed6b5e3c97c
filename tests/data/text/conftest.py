"""Copies of a text, to be damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def text(prepared_text: Path, tmp_path: Path) -> Path:
    """A copy of the text, to be damaged."""
    return Path(shutil.copytree(prepared_text, tmp_path / "text"))


@pytest.fixture
def damaged(text: Path) -> Callable[[str, Callable[[bytes], bytes]], Path]:
    """Changes one file of the text."""

    def change(name: str, to: Callable[[bytes], bytes]) -> Path:
        (text / name).write_bytes(to((text / name).read_bytes()))
        return text

    return change
