"""A stage keeps what it has measured, whatever happens next."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.environment import environment, short_name, timed_device
from benchmarks.stage import NO_TIME, Stage


def _stage(path: Path, seconds: float = 60.0) -> Stage:
    return Stage(path / "deep" / "result.json", "test", {"device": "cpu"}, {}, seconds)


def test_every_case_is_on_disk_as_soon_as_it_is_known(tmp_path: Path) -> None:
    stage = _stage(tmp_path)

    def second() -> dict[str, int]:
        assert [case["case"] for case in json.loads(stage.path.read_text())["cases"]] == [{"name": "first"}]
        return {"figure": 2}

    stage.case(lambda: {"figure": 1}, name="first")
    assert stage.case(second, name="second")["figure"] == 2


def test_an_error_is_a_result_and_the_next_case_runs(tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    stage.case(lambda: 1 // 0, name="broken")  # type: ignore[arg-type,return-value]
    stage.case(lambda: {"figure": 1}, name="fine")
    broken, fine = json.loads(stage.path.read_text())["cases"]
    assert broken["error"].startswith("ZeroDivisionError") and "lambda" in broken["traceback"]
    assert fine["figure"] == 1
    assert [case["case"]["name"] for case in stage.failed()] == ["broken"]
    stage.case(lambda: {"refused": {"ours": "tensor 1 is off by 0.3"}}, name="wrong")
    stage.case(lambda: {"refused": {"ours, compiled": NO_TIME, "compile": "out of memory"}}, name="late")
    assert [case["case"]["name"] for case in stage.failed()] == ["broken", "wrong"]


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    stage = _stage(tmp_path, seconds=0.0)
    outcome = stage.case(lambda: pytest.fail("was begun"), name="late")  # type: ignore[arg-type,return-value]
    assert outcome == {"case": {"name": "late"}, "not_run": NO_TIME}


def test_after_a_lost_device_nothing_more_is_tried(tmp_path: Path) -> None:
    stage = _stage(tmp_path)

    def lost() -> dict[str, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stage.case(lost, name="first")
    outcome = stage.case(lambda: pytest.fail("was begun"), name="second")  # type: ignore[arg-type,return-value]
    assert outcome["not_run"] == "the device was lost to an earlier error (illegal memory access)"


def test_a_part_waits_for_its_own_longest_case_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _stage(tmp_path)
    left = iter([60.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(stage, "remaining", lambda: next(left))
    monkeypatch.setattr(stage, "_longest", {"race": 50.0, "limits": 5.0})
    ran = [stage.case(lambda: {"figure": 1}, part=part) for part in ("race", "limits", "race")]
    assert ["figure" in outcome for outcome in ran] == [True, True, False]
    assert "figure" in stage.case(lambda: {"figure": 1}, part="race", least=10.0)  # it ends itself in time


def test_a_case_that_is_cut_off_has_left_what_it_had(tmp_path: Path) -> None:
    stage = _stage(tmp_path)

    def long() -> dict[str, int]:
        stage.so_far({"rounds": 1})
        [kept] = json.loads(stage.path.read_text())["cases"]
        assert kept == {"case": {"name": "race"}, "rounds": 1, "unfinished": True}
        return {"rounds": 2}

    stage.case(long, name="race")
    assert json.loads(stage.path.read_text())["cases"] == [{"case": {"name": "race"}, "rounds": 2}]


def test_an_error_is_told_with_the_one_it_came_from(tmp_path: Path) -> None:
    def fails() -> dict[str, int]:
        try:
            raise RuntimeError("an illegal memory access was encountered")
        except RuntimeError:
            raise ValueError("the capture failed")  # noqa: B904 (as a context manager's own end does)

    stage = _stage(tmp_path)
    assert stage.case(fails, name="first")["error"].startswith("ValueError: the capture failed, from RuntimeError: an illegal")
    assert "illegal memory access" in stage.case(lambda: {"figure": 1}, name="second")["not_run"]


def test_the_environment_is_plain_and_names_what_matters() -> None:
    found = environment(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu" and found["torch"] and found["cpu"] and found["cores"] > 0
    assert "gpu" not in found


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100"),
        ("NVIDIA GeForce RTX 4090", "nvidia-rtx-4090"),
        ("", "unknown"),
    ],
)
def test_a_devices_folder(full: str, short: str) -> None:
    assert short_name(full) == short


@pytest.mark.parametrize("name", ["cpu", *([] if torch.cuda.is_available() else ["cuda"])])
def test_no_times_are_taken_without_a_gpu(name: str) -> None:
    with pytest.raises(SystemExit, match="--smoke"):
        timed_device(name, smoke=False)
    assert timed_device("cpu", smoke=True).type == "cpu"
