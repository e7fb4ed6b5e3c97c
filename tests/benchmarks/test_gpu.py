"""The stages end in time, say how, and on a machine without a GPU say that they did not run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.environment import ROOT

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a CUDA device, and this one has one")


@WITHOUT_GPU
@pytest.mark.parametrize("plan", gpu.PLANS)
def test_without_a_gpu_every_part_is_reported_as_not_run(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([plan, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert list(parts) == [part.name for part in gpu.PLANS[plan]]
    for name, outcome in parts.items():
        assert outcome == {"not_run": "no CUDA device"}
        assert f"{name}: not run (no CUDA device)\n" in told


def test_each_stage_ends_within_nine_minutes_and_the_digest_within_ten() -> None:
    for plan in ("tests", "kernels", "step", "parity"):
        assert sum(part.seconds + gpu.GRACE for part in gpu.PLANS[plan]) <= 9 * 60 + 30
    assert sum(part.seconds + gpu.GRACE for part in gpu.PLANS["digest"]) <= 10 * 60


def test_a_part_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "child-was-here"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    assert gpu.run_command([sys.executable, "-c", parent], 1.0, tmp_path) is None
    assert time.monotonic() - begin < 2.5
    time.sleep(2.5)
    assert not mark.exists()


def test_a_plan_that_is_told_to_end_leaves_no_stage_behind(tmp_path: Path) -> None:
    mark = tmp_path / "child-was-here"
    child = f"import time, pathlib; print('began', flush=True); time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    plan = (
        "import pathlib, sys; from benchmarks import gpu; gpu.end_when_told();"
        f"gpu.run_command([sys.executable, '-c', {child!r}], 60.0, pathlib.Path({str(tmp_path)!r}))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen([sys.executable, "-c", plan], env={**os.environ, "PYTHONPATH": path})
    deadline, log = time.monotonic() + 60, tmp_path / "log.txt"
    while not (log.exists() and "\nbegan" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=20) == 143
    time.sleep(3.5)
    assert not mark.exists()


def test_output_and_status_are_kept(tmp_path: Path) -> None:
    assert gpu.run_command([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], 20.0, tmp_path) == 3
    assert "hello" in (tmp_path / "log.txt").read_text()


TESTS = """
import time, pytest
def test_fine(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip(reason="for a reason")
def test_skipped(): pass
def test_slow(): time.sleep(1.0)
def test_late(): pass
"""


def _record(tmp_path: Path, *options: str, more: str = "") -> dict[str, Any]:
    (tmp_path / "test_some.py").write_text(TESTS + more)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.recorder", "--record", "out.json", *options, "test_some.py"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False)
    return json.loads((tmp_path / "out.json").read_text())["parts"]


def test_the_recorder_keeps_every_outcome_and_parts_share_a_file(tmp_path: Path) -> None:
    _record(tmp_path, "--record-part", "first", "-k", "fine")
    parts = _record(tmp_path, "--record-part", "second")
    assert parts["first"]["outcomes"] == {"passed": 1}
    assert parts["second"]["outcomes"] == {"passed": 3, "failed": 1, "skipped": 1}
    assert parts["second"]["complete"] and parts["second"]["not_run"] == 0
    assert parts["second"]["skipped"] == {"for a reason": 1}
    [failure] = parts["second"]["failures"]
    assert failure["name"].endswith("test_wrong") and "1 == 2" in failure["message"]


def test_the_recorder_ends_the_run_when_time_is_up(tmp_path: Path) -> None:
    part = _record(tmp_path, "--record-seconds", "0.5")["tests"]
    assert part["outcomes"]["passed"] == 2 and part["not_run"] == 1
    assert not part["complete"]


def test_the_recorder_ends_a_parallel_run_too(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    more = "".join(f"def test_more_{i}(): time.sleep(0.3)\n" for i in range(20))
    part = _record(tmp_path, "-n", "2", "--record-seconds", "1.2", more=more)["tests"]
    assert not part["complete"] and part["not_run"] > 5
    assert sum(part["outcomes"].values()) + part["not_run"] == 25
