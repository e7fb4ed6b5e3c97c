"""Trainings that are stopped, lose a rank, or meet a mistake in one of them: real commands on two ranks, and DeepSpeed's own launcher."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fasttrain.cli import main
from tests.living import Living, living
from tests.runs import plain_config, zero
from tests.test_resume import MANY, TIMEOUT, _records, _start, _wait_for_step, _write_config


def _config(folder: Path, digits: Path, **sections: Any) -> Path:
    training = {"steps": MANY, "timeout_seconds": 60, **sections.pop("training", {})}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(plain_config(folder, digits, deepspeed=zero(1), training=training, **sections)))
    return path


def _train(config: Path, *overrides: str) -> None:
    sys.exit(main(["train", str(config), *overrides]))


def _wait(ranks: Living, folder: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not any(record["step"] >= step for record in _records(folder)):
        assert all(process.exitcode is None for process in ranks.processes), [ranks.output(rank) for rank in range(len(ranks.processes))]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _latest(folder: Path) -> str:
    return (folder / "checkpoints" / "latest").read_text().strip()


@pytest.mark.parametrize(("number", "world_size"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_one_rank_is_asked_and_all_save_and_stop_with_its_number(number: signal.Signals, world_size: int, tmp_path: Path, digits: Path):
    """The second SIGTERM comes while the last checkpoint is saved, or just after."""
    folder = tmp_path / "run"
    with living(world_size, tmp_path, _train, _config(folder, digits)) as ranks:
        _wait(ranks, folder, 3)
        ranks.send(world_size - 1, number)
        ranks.send(world_size - 1, signal.SIGTERM)
        assert [ranks.status(rank, 30) for rank in range(world_size)] == [128 + number] * world_size, ranks.output(0)
        last = _records(folder)[-1]["step"]
        assert f"stopped and saved at step {last} of {MANY}" in ranks.output(0)
        assert "Traceback" not in "".join(ranks.output(rank) for rank in range(world_size))
    assert _latest(folder) == f"step-{last:08d}"
    assert not (folder / "faults").exists()


def test_a_second_interrupt_ends_the_process_at_once(tmp_path: Path, digits: Path):
    folder = tmp_path / "run"
    with living(1, tmp_path, _train, _config(folder, digits, checkpoint={"every": 2})) as ranks:
        _wait(ranks, folder, 5)
        ranks.send(0, signal.SIGSTOP)  # so that both are there before it does anything
        ranks.send(0, signal.SIGINT)
        ranks.send(0, signal.SIGCONT)
        time.sleep(0.002)
        ranks.send(0, signal.SIGINT)
        assert ranks.status(0, 5) in (-signal.SIGINT, 130)
    assert (folder / "checkpoints" / _latest(folder) / "manifest.json").exists()


def _train_slowly_begun(config: Path) -> None:
    """A training whose start takes long enough to be caught in it."""
    from fasttrain.trainer import Trainer

    find = Trainer.find_checkpoint

    def found_late(trainer: Trainer) -> Any:
        print("starting", flush=True)
        time.sleep(3)
        return find(trainer)

    Trainer.find_checkpoint = found_late
    _train(config)


def test_stopped_while_starting_leaves_nothing_half_written(tmp_path: Path, digits: Path):
    folder = tmp_path / "run"
    with living(2, tmp_path, _train_slowly_begun, _config(folder, digits)) as ranks:
        ranks.wait_for("starting")
        ranks.send(0, signal.SIGTERM)
        assert [ranks.status(rank, 15) for rank in range(2)] == [143, 143], ranks.output(0) + ranks.output(1)
        assert "stopped by SIGTERM before training began" in ranks.output(0)
        assert "Traceback" not in ranks.output(0) + ranks.output(1)
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_killed_rank_ends_the_other_with_the_status_to_restart_on(tmp_path: Path, digits: Path):
    folder = tmp_path / "run"
    with living(2, tmp_path, _train, _config(folder, digits)) as ranks:
        _wait(ranks, folder, 3)
        ranks.send(1, signal.SIGKILL)
        assert ranks.status(0, 5) == 138, ranks.output(0)
        output = ranks.output(0)
    assert output.count("rank 1 (host ") == 1
    assert "Traceback" not in output
    # Of the training thread, in a step or between two.
    assert " in fit\n" in (folder / "faults" / "0001" / "rank-00000.txt").read_text()


def _train_with_a_bad_shard(config: Path) -> None:
    from fasttrain.errors import UserError
    from fasttrain.trainer import Trainer

    step = Trainer.train_step

    def train_step(trainer: Trainer) -> bool:
        if trainer.processes.rank == 1 and trainer.progress.step == 3:
            raise UserError("shard 7 is damaged: prepare it again")
        return step(trainer)

    Trainer.train_step = train_step
    _train(config)


def test_a_mistake_that_one_rank_meets_is_told_once_and_ends_all_with_status_2(tmp_path: Path, digits: Path):
    with living(2, tmp_path, _train_with_a_bad_shard, _config(tmp_path / "run", digits)) as ranks:
        assert [ranks.status(rank, 60) for rank in range(2)] == [2, 2]
        output = ranks.output(0) + ranks.output(1)
    assert output.count("shard 7 is damaged") == 1
    assert "Traceback" not in output


def _train_differently(config: Path) -> None:
    _train(config, *(["optimizer.learning_rate=0.5"] if os.environ["RANK"] == "1" else []))


def test_ranks_with_different_configs_are_refused_by_name(tmp_path: Path, digits: Path):
    with living(2, tmp_path, _train_differently, _config(tmp_path / "run", digits)) as ranks:
        assert [ranks.status(rank, 60) for rank in range(2)] == [2, 2]
        output = ranks.output(0) + ranks.output(1)
    assert output.count("ranks [1] were started with another config") == 1
    assert "learning_rate" in output


def test_a_launcher_that_dies_alone_leaves_no_orphans(tmp_path: Path, digits: Path):
    """SIGKILL to `deepspeed` only; its launcher of the node and the ranks would train on."""
    folder = tmp_path / "run"
    process = _start(_write_config(folder, digits, stage=1, steps=MANY), ranks=2)
    _wait_for_step(process, folder, 5)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3
    process.kill()
    _, left = psutil.wait_procs(below, timeout=30)
    for orphan in left:
        orphan.kill()
    output = process.communicate(timeout=TIMEOUT)[0]
    assert not left, output
    # Told by rank 0 where it notices first; the other's request may reach it before.
    assert output.count("which started this run, has died") <= 1
    last = _records(folder)[-1]["step"]
    assert f"stopped and saved at step {last}" in output
    assert _latest(folder) == f"step-{last:08d}"
