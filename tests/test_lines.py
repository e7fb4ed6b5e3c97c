"""Records outlive kills and full disks: half a line is cut away, and what found no room is written when there is some."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from fasttrain.lines import Lines, records
from tests.disks import fill


def test_what_a_resumed_run_takes_again_is_forgotten(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 10, "loss": 1}\n{"step": 7, "spike": {}}\nnoise\n{"step": 20}\n{"step": 15, "held_out_loss": 2}\n{"step": 30, "lo'
    )
    lines = Lines(path)
    lines.forget_after(15)
    lines.write({"step": 16, "loss": math.nan, "losses": [1.0, math.inf]})
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "loss": 1},
        {"step": 7, "spike": {}},
        {"step": 15, "held_out_loss": 2},
        {"step": 16, "loss": "nan", "losses": [1.0, "inf"]},
    ]
    assert [record["step"] for record in records(path)] == [10, 7, 15, 16]


def test_lines_that_are_no_records_are_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n{"step": "3"}\n{"no": 1}\n{"step": 4}\n')
    assert list(records(path)) == [{"step": 4}]
    assert list(records(tmp_path / "none.jsonl")) == []


def test_records_wait_for_room_and_none_is_lost(disk: Callable[[int], Path]):
    folder = disk(256 << 10)
    lines = Lines(folder / "metrics.jsonl")
    lines.write({"step": 1, "pad": "x" * 3000})
    fill(folder, 2000)
    for step in range(2, 12):
        lines.write({"step": step, "pad": "x" * 3000})
    assert lines.problem == "No space left on device"
    for other in folder.iterdir():
        if other.name != "metrics.jsonl":
            other.unlink()
    lines.write({"step": 12})
    assert lines.problem is None
    lines.close()
    assert [record["step"] for record in records(folder / "metrics.jsonl")] == list(range(1, 13))
