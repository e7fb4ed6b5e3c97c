"""Models that others trained: a folder, or a hub id at a pinned commit. Safetensors only: the other format runs code."""

import re
from pathlib import Path

import xxhash

from fasttrain.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 24


def pinned(option: str, name: str, revision: str | None, what: str) -> str | None:
    """The revision to load: None for a folder here, the commit for a hub id.

    Args:
        option: that named the model, as messages call it ("--vae"); OPTION-revision names its commit.
        name: folder, or hub id (owner/name).
        revision: commit hash, 40 hexadecimal digits; needed for a hub id, since a branch may move.
        what: the model, for the remedy ("an AutoencoderKL").

    Raises:
        UserError: no such folder and no hub id, or a hub id without its commit.
    """
    if Path(name).is_dir():
        return None
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{option} {name}: no such folder, nor a hub id (owner/name); give the folder of {what}")
    if revision is None or not _COMMIT.fullmatch(revision):
        told = f"{option} {name}: no such folder here; as a hub id it needs {option}-revision with the commit's 40 hexadecimal digits"
        raise UserError(f"{told}{f' (got {revision!r})' if revision else ''}, because a branch may change")
    return revision


def folder_digest(folder: Path) -> str:
    """xxh3 of the names and content of a model's files: which weights these are, wherever the folder lies."""
    hasher = xxhash.xxh3_128()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        hasher.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
    return hasher.hexdigest()


def first_line(error: Exception) -> str:
    """What a library's error says, in one line of a message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
