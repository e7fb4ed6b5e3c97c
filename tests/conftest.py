"""What many tests share: prepared digits, made once a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fasttrain.cli import main
from tests.disks import disk  # noqa: F401 (a fixture)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Two cores run several tests at once: more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the user's own commands keep decides no test. A rank has the surroundings of its server, which starts with the first one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as shards, prepared by the real command."""
    out = tmp_path_factory.mktemp("digits") / "shards"
    assert main(["prepare", "digits", str(out)]) == 0
    return out
