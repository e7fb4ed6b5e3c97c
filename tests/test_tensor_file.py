"""A file of tensors is whole or absent, and what kept it from being written is told as the system's own error."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fasttrain.tensor_file import write_tensors
from tests.disks import fill


def test_tensors_come_back_with_what_was_told_of_them(tmp_path: Path):
    turned = torch.arange(6.0).reshape(2, 3).T
    write_tensors(tmp_path / "new" / "a.safetensors", {"turned": turned}, {"told": "yes"})
    with safe_open(tmp_path / "new" / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("turned"), turned) and file.metadata() == {"told": "yes"}


def test_a_full_disk_is_a_full_disk_and_leaves_what_was_there(disk):
    folder = disk(1 << 20)
    write_tensors(folder / "a.safetensors", {"x": torch.zeros(3)}, {})
    before = (folder / "a.safetensors").read_bytes()
    fill(folder, leave=1 << 14)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_tensors(folder / "a.safetensors", {"x": torch.zeros(1 << 16)}, {})
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOSPC, "No space left on device")
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "ballast"]
    assert (folder / "a.safetensors").read_bytes() == before
