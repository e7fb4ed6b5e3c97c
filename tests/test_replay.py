"""A step taken again is the same step: what the run lost, skipped and drew in it, with the sample and the parameters at fault named."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fasttrain.config import parse_config
from fasttrain.engine.distributed import Processes
from fasttrain.lines import records
from fasttrain.replay import replay
from fasttrain.trainer import Trainer
from tests.commands import Done, fasttrain
from tests.ranks import run_ranks
from tests.runs import Recorder, plain_config, start, zero
from tests.test_skipping import poison

BAD = 7 * 16 + 5  # a position of step 8


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in sorted(folder.rglob("*")) if "replays" not in path.parts]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size if path.is_file() else 0) for path in files}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Twelve steps, the eighth of which one image spoils; a checkpoint every five."""
    folder = tmp_path_factory.mktemp("poisoned") / "run"
    raw = plain_config(folder, digits, training={"steps": 12, "micro_batch": 8}, checkpoint={"every": 5, "keep_last": 3}, log={"every": 6})
    folder.with_suffix(".yaml").write_text(json.dumps(raw))
    assert _poisoned("train", folder.with_suffix(".yaml")).status == 0
    return folder


def _poisoned(*arguments: Any) -> Done:
    return fasttrain(*arguments, before=partial(poison, BAD, BAD))


def test_a_skipped_step_is_skipped_again_and_the_image_named(poisoned: Path):
    (poisoned / "replays").mkdir(exist_ok=True)
    before = _snapshot(poisoned)
    done = _poisoned("replay", poisoned, "8")
    assert done.status == 0, done
    report = json.loads((poisoned / "replays" / "step-00000008.json").read_text())
    [skipped] = records(poisoned / "skipped.jsonl")
    assert (skipped["step"], skipped["position"], skipped["losses"][0][1]) == (8, 7 * 16, pytest.approx(1, abs=5))
    assert (report["taken"], report["from_step"], report["comparison"]["reproduced"]) == (False, 5, True)
    samples = [sample for batch in report["micro_batches"] for sample in batch["samples"]]
    assert [sample["position"] for sample in samples] == list(range(7 * 16, 8 * 16))
    assert [sample["position"] for sample in samples if sample["loss"] == "nan"] == [BAD]
    assert [batch["finite"] for batch in report["micro_batches"]] == [False, True]
    assert report["not_finite"] and set(report["not_finite"]) <= set(report["grad_norms"])
    assert f"position {BAD}," in done.out and "reproduced: skipped again" in done.out
    assert _snapshot(poisoned) == before


def test_a_step_that_was_taken_has_the_same_loss_bit_for_bit(poisoned: Path):
    for step, begun in ((4, 0), (9, 5), (11, 10)):
        done = _poisoned("replay", poisoned, step, "--out", poisoned.parent / "report.json")
        assert done.status == 0 and "reproduced: the same loss bit for bit" in done.out, done
        assert json.loads((poisoned.parent / "report.json").read_text())["from_step"] == begun


def test_a_report_that_cannot_be_written_is_told_before_any_step(poisoned: Path):
    done = fasttrain("replay", poisoned, "8", "--out", poisoned)
    assert done.status == 2 and f"--out {poisoned}: is a folder; give the name of a file" in done.err and "steps to take" not in done.out


def test_without_its_cause_a_step_is_not_reproduced(poisoned: Path):
    done = fasttrain("replay", poisoned, "8", "--out", poisoned.parent / "report.json")
    assert "not reproduced: the step was skipped in the run, and is taken now" in done.out


@pytest.mark.parametrize("step", ["0", "-3", "13"])
def test_a_step_that_the_run_does_not_have(step: str, poisoned: Path):
    done = fasttrain("replay", "--", poisoned, step)
    assert done.status == 2 and "its steps are 1 to 12" in done.err, done


def test_a_folder_that_is_no_run(tmp_path: Path):
    done = fasttrain("replay", tmp_path, "3")
    assert done.status == 2 and "no run folder" in done.err


def _run_and_replay(processes: Processes, raws: list[dict[str, Any]]) -> list[dict[str, Any]]:
    reports = []
    for raw in raws:
        trainer = Trainer(parse_config(raw, "test"), processes)
        trainer.fit()
        trainer.engine.destroy()
        told: list[str] = []
        report = replay(parse_config(raw, "test"), 5, processes, told.append)
        record = [record for record in records(trainer.config.run_dir / "metrics.jsonl") if record["step"] == 5]
        reports.append({**report, "norm_then": record[0]["grad_norm"], "said": told, "drawn": _drawn(processes, raw)})
    return reports


def _drawn(processes: Processes, raw: dict[str, Any]) -> dict[int, Any]:
    trainer = start(processes, {**raw, "run_dir": raw["run_dir"] + "-again"})
    recorder = Recorder(trainer)
    for _ in range(5):
        trainer.train_step()
    trainer.loader.close()
    trainer.engine.destroy()
    return recorder.drawn


@pytest.mark.parametrize("world_size", [1, 2])
def test_at_every_stage_what_was_drawn_and_the_gradients_are_those_of_the_run(world_size: int, tmp_path: Path, digits: Path):
    cases = [(stage, "fp32" if (stage + world_size) % 2 else "bf16") for stage in (0, 1, 2, 3)]
    raws = [
        plain_config(
            tmp_path / f"run-{stage}",
            digits,
            deepspeed=zero(stage),
            training={"steps": 5, "precision": precision, "micro_batch": 4, "clip": 0.1},
            checkpoint={"every": 3},
        )
        for stage, precision in cases
    ]
    per_rank = run_ranks(world_size, _run_and_replay, raws)
    for i, case in enumerate(cases):
        report = per_rank[0][i]
        assert report["comparison"] == {"reproduced": True, "told": "reproduced: the same loss bit for bit"}, case
        assert report["from_step"] == 3 and report["not_finite"] == []
        together = math.sqrt(sum(norm**2 for norm in report["grad_norms"].values()))
        assert together == pytest.approx(report["norm_then"], rel=1e-2 if case[1] == "bf16" else 1e-5), case
        drawn = {n: what for rank in per_rank for n, what in rank[i]["drawn"].items()}
        seen = {s["position"]: (s["sample_id"], s["timestep"]) for b in report["micro_batches"] for s in b["samples"]}
        assert seen == {n: drawn[n][:2] for n in range(4 * 16, 5 * 16)}
