"""A rank holds its share of the training state and no more: the bytes behind it, counted, against the estimate of models/memory.py."""

from pathlib import Path

import pytest

from benchmarks.state_per_rank import measure

# Partitions are padded to equal, aligned lengths, and ZeRO 3 pads each parameter.
PADDING = 1.02


@pytest.mark.parametrize("world_size", [2])
def test_zero_divides_the_state_by_the_world_size(world_size: int, tmp_path: Path, digits: Path):
    rows = measure(tmp_path, digits, [world_size], depth=1, width=64, stages=(0, 2, 3))
    whole = 4 * 4 * rows[0]["parameters"]  # masters, two moments and an average of four bytes each
    for row in rows:
        share = whole if row["stage"] == 0 else whole / world_size
        assert share <= row["state"] <= PADDING * share, row
        assert row["estimate"] <= row["state"] <= PADDING * row["estimate"], row
