"""A slower result fails by name, a noisy one does not, and what cannot be compared is said."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import track


def _seconds(median: float, spread: float = 0.01) -> dict[str, Any]:
    return {"seconds": {"median": median, "interval": [median * (1 - spread), median * (1 + spread)]}}


def _result(**changes: Any) -> dict[str, Any]:
    cases = [
        {"case": {"operation": "adaln", "batch": 32}, "arms": {"ours": {"forward": _seconds(1.0), "backward": _seconds(2.0)}}},
        {"case": {"operation": "noising", "batch": 32}, "arms": {"ours": {"forward": _seconds(3.0)}}},
    ]
    base = {
        "benchmark": "kernels",
        "environment": {"device": "nvidia-h200"},
        "settings": {"dtype": "bfloat16", "rounds": 5},
        "cases": cases,
    }
    return {**copy.deepcopy(base), **changes}


def _main(tmp_path: Path, new: dict[str, Any], old: dict[str, Any], *options: str) -> int:
    for name, result in (("new.json", new), ("old.json", old)):
        (tmp_path / name).write_text(json.dumps(result))
    return track.main([str(tmp_path / "new.json"), "--baseline", str(tmp_path / "old.json"), *options])


def test_the_same_result_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(tmp_path, _result(), _result()) == 0
    assert capsys.readouterr().out == "3 times compared, 0 regressed, 0 lost\n"


def test_a_regression_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = _result()
    slower["cases"][0]["arms"]["ours"]["backward"] = _seconds(2.2)
    assert _main(tmp_path, slower, _result()) == 1
    assert "regressed: operation adaln, batch 32: arms ours backward: 2 s before, 2.2 s now (+10.0%)" in capsys.readouterr().out
    assert _main(tmp_path, slower, _result(), "--allowance", "0.2") == 0


def test_within_the_intervals_is_no_regression(tmp_path: Path) -> None:
    noisy, old = _result(), _result()
    noisy["cases"][1]["arms"]["ours"]["forward"] = _seconds(3.3, spread=0.1)
    old["cases"][1]["arms"]["ours"]["forward"] = _seconds(3.0, spread=0.05)
    assert _main(tmp_path, noisy, old) == 0


def test_a_time_that_is_gone_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = _result()
    broken["cases"][1] = {"case": broken["cases"][1]["case"], "error": "RuntimeError: out of memory"}
    assert _main(tmp_path, broken, _result()) == 1
    assert "lost: operation noising, batch 32: arms ours forward" in capsys.readouterr().out


def test_what_there_was_no_time_for_is_told_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = _result()
    short["cases"][1] = {"case": short["cases"][1]["case"], "not_run": "the stage's time was up"}
    assert _main(tmp_path, short, _result()) == 0
    assert "not run this time: operation noising, batch 32" in capsys.readouterr().out


def test_a_digest_is_held_to_the_cases_it_took(tmp_path: Path) -> None:
    digest = _result(settings={"dtype": "bfloat16", "digest": True})
    digest["cases"] = digest["cases"][:1]
    assert _main(tmp_path, digest, _result()) == 0
    del digest["cases"][0]["arms"]["ours"]["backward"]
    assert _main(tmp_path, digest, _result()) == 1


@pytest.mark.parametrize(
    "change",
    [{"environment": {"device": "nvidia-h100"}}, {"benchmark": "step"}, {"settings": {"dtype": "float16"}}, {"cases": []}],
    ids=str,
)
def test_what_cannot_be_compared_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]) -> None:
    old = _result(cases=[]) if "cases" in change else _result()
    assert _main(tmp_path, _result(**change), old) == track.INCOMPARABLE
    assert "not compared:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "words"), [("nvidia-none", "no result of nvidia-none is committed"), ("cpu", "cpu/new.json is not committed")]
)
def test_an_unknown_device_or_result_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str, words: str) -> None:
    (tmp_path / "new.json").write_text(json.dumps(_result(environment={"device": device})))
    assert track.main([str(tmp_path / "new.json")]) == track.INCOMPARABLE
    assert words in capsys.readouterr().out
