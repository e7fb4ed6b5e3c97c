"""Real processes, real launcher, real signals: a run that was killed or stopped continues as if nothing had happened.

The launcher and a fresh interpreter are what signals go to; ranks that are killed or end by themselves are forked (tests/living.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from fasttrain.checkpoint import Manifest, read_weights
from tests.living import command, living
from tests.ranks import free_port, run_ranks
from tests.runs import merged, plain_config, trace, zero

STEPS, SAVE_EVERY = 40, 5  # long enough that a run does not end before it can be killed, on a busy machine too
MANY = 5000  # more than are done before a signal arrives
TIMEOUT = 120
ROOT = Path(__file__).resolve().parents[1]


def _write_config(folder: Path, digits: Path, stage: int, steps: int = STEPS) -> Path:
    path = folder.with_suffix(".yaml")
    raw = plain_config(folder, digits, deepspeed=zero(stage), training={"steps": steps}, checkpoint={"every": SAVE_EVERY})
    path.write_text(yaml.safe_dump(raw))
    return path


def _start(config: Path, ranks: int) -> subprocess.Popen[str]:
    """`fasttrain train CONFIG`, on several ranks through DeepSpeed's own launcher."""
    command = [sys.executable, "-m", "fasttrain"]
    if ranks > 1:
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port()), "--module", "fasttrain"]
    source = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])  # so that it also runs where nothing is installed
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": source}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.Popen([*command, "train", str(config)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not _reached(run_dir, step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} was not reached in {TIMEOUT} s"
        time.sleep(0.005)


def _reached(run_dir: Path, step: int) -> bool:
    return any(record["step"] >= step for record in _records(run_dir))


def _finish(config: Path, outputs: Path) -> str:
    """What the first of two ranks prints of `fasttrain train CONFIG`."""
    outputs.mkdir()
    with living(2, outputs, command, "train", config) as ranks:
        assert [ranks.status(rank, TIMEOUT) for rank in range(2)] == [0, 0], ranks.output(0) + ranks.output(1)
        return ranks.output(0)


def _kill_after(step: int, config: Path, outputs: Path) -> None:
    """SIGKILL to both ranks of a run once that step was taken."""
    outputs.mkdir()
    with living(2, outputs, command, "train", config) as ranks:
        deadline = time.monotonic() + TIMEOUT
        while not _reached(config.with_suffix(""), step):
            assert all(process.exitcode is None for process in ranks.processes), ranks.output(0) + ranks.output(1)
            assert time.monotonic() < deadline, f"step {step} was not reached in {TIMEOUT} s"
            time.sleep(0.005)
        for rank in range(2):
            ranks.send(rank, signal.SIGKILL)
        assert [ranks.status(rank) for rank in range(2)] == [-signal.SIGKILL] * 2


def _state(run_dir: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    manifest = Manifest.read(folder)
    return {key: read_weights(folder, manifest, key) for key in manifest.states}


def _same_bits(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(one[key][name], tensor) for key, tensors in other.items() for name, tensor in tensors.items())


def _losses_after(run_dir: Path, step: int) -> dict[int, Any]:
    """The last record of each later step, without what a clock decides."""
    timed = ("images_per_second", "seconds_left", "data_wait", "slowest")
    return {r["step"]: {key: value for key, value in r.items() if key not in timed} for r in _records(run_dir) if r["step"] > step}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Two ranks under ZeRO-2, from the first step to the last."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    output = _finish(_write_config(folder, digits, stage=2), folder.parent / "outputs")
    assert f"trained {STEPS} steps" in output
    return folder


def test_killed_after_step_10_and_restarted_is_the_same_run_bit_for_bit(tmp_path: Path, digits: Path, uninterrupted: Path):
    folder = tmp_path / "run"
    config = _write_config(folder, digits, stage=2)
    _kill_after(11, config, tmp_path / "killed")
    reached = max(record["step"] for record in _records(folder))
    assert 11 <= reached < STEPS

    output = _finish(config, tmp_path / "again")
    assert "continuing from step-000000" in output
    after, expected = _losses_after(folder, 10), _losses_after(uninterrupted, 10)
    assert sorted(after) == list(range(11, STEPS + 1))
    assert after == expected
    assert _same_bits(_state(folder, STEPS), _state(uninterrupted, STEPS))


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_saves_and_exits_cleanly(number: signal.Signals, ranks: int, tmp_path: Path, digits: Path):
    """SIGTERM goes to DeepSpeed's launcher of the node, which passes it to one rank after another; Ctrl-C to the process itself.

    (`deepspeed` itself only starts that launcher, and on one node passes no signal on.)
    """
    folder = tmp_path / "run"
    process = _start(_write_config(folder, digits, stage=1, steps=MANY), ranks)
    _wait_for_step(process, folder, 7)
    target = psutil.Process(process.pid)
    if ranks > 1:
        [target] = [child for child in target.children() if "deepspeed.launcher.launch" in child.cmdline()]
    target.send_signal(number)
    output = process.communicate(timeout=TIMEOUT)[0]
    last = _records(folder)[-1]["step"]
    assert 7 <= last < MANY
    assert f"stopped and saved at step {last} of {MANY}" in output
    assert "Traceback" not in output
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{last:08d}"
    if ranks == 1:
        assert process.returncode == 128 + number


def test_restarted_at_another_world_size_and_stage_is_equal_to_rounding(tmp_path: Path, digits: Path):
    """Four ranks under ZeRO-3 stop after 10 steps; one rank under ZeRO-0 and two under ZeRO-1 go on."""

    def raw(stage: int) -> dict[str, Any]:
        return plain_config(tmp_path / "run", digits, deepspeed=zero(stage), data={"flip": True})

    whole = merged(run_ranks(1, trace, {**raw(1), "run_dir": str(tmp_path / "whole")}, 20))
    parts = [
        merged(run_ranks(4, trace, raw(3), 10, True)),
        merged(run_ranks(1, trace, raw(0), 5, True)),
        merged(run_ranks(2, trace, raw(1), 5, True)),
    ]
    drawn = {n: what for part in parts for n, what in part["drawn"].items()}
    assert drawn == whole["drawn"]
    losses = [loss for part in parts for loss in part["losses"]]
    torch.testing.assert_close(losses, whole["losses"], rtol=5e-6, atol=0)


def test_a_finished_run_started_again_does_nothing(uninterrupted: Path, tmp_path: Path):
    before = _snapshot(uninterrupted / "checkpoints")
    output = _finish(uninterrupted.with_suffix(".yaml"), tmp_path / "again")
    assert f"trained {STEPS} steps" in output
    assert _snapshot(uninterrupted / "checkpoints") == before


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    stat: Callable[[Path], os.stat_result] = Path.stat
    return {str(path): (stat(path).st_mtime_ns, stat(path).st_size) for path in sorted(folder.rglob("*"))}
