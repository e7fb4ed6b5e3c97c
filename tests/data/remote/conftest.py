"""A folder of files, a faulty web server before it, and readers of both."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data.config import DataConfig
from fasttrain.data.files import ShardFiles
from fasttrain.data.remote.store import open_files
from tests.http_server import FaultyServer

SIZES = {"a.tar": 300_000, "b.tar": 250_000, "c.tar": 400_000, "d.tar": 10, "void.tar": 0}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Files of random bytes."""
    folder = tmp_path / "stored"
    folder.mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_bytes(np.random.default_rng(number).bytes(size))
    return folder


@pytest.fixture
def server(stored: Path) -> Iterator[FaultyServer]:
    with FaultyServer(stored) as server:
        yield server


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., ShardFiles]]:
    """Opens the files at a place with a cache of this test; `close` is called at its end."""
    found: list[ShardFiles] = []

    def open_at(place: str, mib: float = 64, fresh: tuple[str, ...] = (), **keys: object) -> ShardFiles:
        keys = {"cache": str(tmp_path / "cache"), "cache_gib": mib / 1024, "retry_seconds": 5.0, **keys}
        found.append(open_files(place, DataConfig(train=place, **keys), fresh))
        return found[-1]

    yield open_at
    for files in found:
        files.close()
