"""The README's tables come from the committed results, and its check notices when they do not."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import report
from benchmarks.tables import NOT_MEASURED


def _seconds(median: float) -> dict[str, Any]:
    return {"median": median, "p10": median, "p90": median, "interval": [median, median], "count": 5}


RATIO = {"median": 1.5, "interval": [1.4, 1.6], "level": 0.95}
SHARES = {"mfu_measured": 0.6, "mfu_datasheet": 0.5, "peak_bytes": 2**34}
ABOUT = {"device": "nvidia-h200", "gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"}


def _kernels() -> dict[str, Any]:
    def rates(share: float) -> dict[str, Any]:
        return {"seconds": _seconds(1e-3), "bytes": 4e9, "bytes_per_second": share * 4e12, "of_copy": share, "of_datasheet": share / 1.2}

    arms = {"compile": {"forward": rates(0.6), "backward": rates(0.4)}, "ours": {"forward": rates(0.9), "backward": rates(0.8)}}
    cases = [
        {"case": _name("adaln", 800), "arms": arms, "refused": {}, "backward_compile_over_ours": RATIO},
        {"case": _name("adaln", 32), "arms": arms, "refused": {}},
        {"case": _name("gated_adaln", 800), "arms": {"compile": arms["compile"]}, "refused": {"ours": "tensor 1 is off by 0.3"}},
        {"case": _name("qk_norm", 800), "error": "RuntimeError: out of memory"},
    ]
    return {"benchmark": "kernels", "environment": ABOUT, "settings": {}, "copy": {"bytes_per_second": 4e12}, "cases": cases}


def _name(operation: str, batch: int) -> dict[str, Any]:
    return {"operation": operation, "options": "norm layer", "sample": [256, 1152], "batch": batch}


def _step() -> dict[str, Any]:
    def arm(rate: float) -> dict[str, Any]:
        return {
            "step": {"seconds": _seconds(64 / rate)},
            "images_per_second": rate,
            "mfu_measured": 0.6,
            "mfu_datasheet": 0.5,
            "peak_bytes": 2**34,
        }

    race = {
        "case": {"part": "arms", "model": "dit-xl/2", "batch": 64},
        "arms": {"compile": arm(580.0), "compile + graphs": arm(590.0), "ours": arm(700.0)},
        "best_of_ours": "ours",
        "over_ours": {"compile": {**RATIO, "median": 1.21}, "compile + graphs": {**RATIO, "median": 1.19}},
        "refused": {"eager": "OutOfMemoryError: 64 GiB"},
    }
    return {"benchmark": "step", "environment": ABOUT, "settings": {"digest": True}, "cases": [race]}


def _parity() -> dict[str, Any]:
    curves = {"losses": {"reference": [0.3, 0.2], "kernels": [0.3, 0.2]}, "differences": {"kernels": [1e-8, 2e-8], "budget": [1e-7, 1e-7]}}
    case = {"case": {"model": "vit"}, "agree": True, "largest_share_of_budget": 0.2, "final_weights_apart": {"kernels": 1e-7}, **curves}
    return {"environment": {"device": "cpu"}, "settings": {"steps": 2, "kernels_run": "in Triton's interpreter"}, "cases": [case]}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks" / "results"
    for path, result in (("nvidia-h200/kernels", _kernels()), ("nvidia-h200/step", _step()), ("cpu/parity", _parity())):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).with_suffix(".json").write_text(json.dumps(result))
    return folder


def _readme(*names: str) -> str:
    return "# title\n" + "\n".join(f"<!-- table: {name} -->\nSTALE\n<!-- end -->\ntext" for name in names) + "\n"


def test_tables_are_made_from_the_results_and_the_text_around_stays(results: Path) -> None:
    text = report.filled(_readme("kernels", "step", "parity"), results)
    assert "STALE" not in text and text.count("text") == 3 and text.startswith("# title\n")
    assert "| adaln | backward | 256 x 1152, 800 | 3.20 TB/s | 80 % | 67 % | 1.50 (1.40 to 1.60) |" in text
    assert "| gated_adaln | forward | 256 x 1152, 800 |  |  |  | refused: tensor 1 is off by 0.3 |" in text
    assert "| dit-xl/2, batch 64 | ours | 700 |" in text and "no speed: OutOfMemoryError: 64 GiB" in text
    assert "NVIDIA H200, torch 2.11.0, Triton 3.6.0, the ten-minute digest" in text
    assert "| vit | 2 steps, in Triton's interpreter | agree | 0.20 | 1.0e-07 |" in text
    assert report.filled(text, results) == text


def test_targets_line_by_line(results: Path) -> None:
    text = report.filled(_readme("targets"), results)
    assert "| DiT-XL/2 against tuned torch.compile | 1.10x | 1.25x | 1.19x, reached |" in text  # against the better baseline
    assert "| AdaLN backward | 77 % of copy | 85 % of copy | 80 % of copy, reached |" in text
    assert "| AdaLN forward, D = 1152, cold L2 | 86 % of copy | 90 % of copy | 90 % of copy, stretch reached |" in text
    assert "| ViT-XL/2 against tuned torch.compile | 1.05x | 1.15x | not measured |" in text
    assert "| gated AdaLN forward, D = 1152, cold L2 | 86 % of copy | 90 % of copy | not measured |" in text


def test_without_a_gpus_results_nothing_is_claimed(results: Path) -> None:
    for path in (results / "nvidia-h200").iterdir():
        path.unlink()
    text = report.filled(_readme("kernels", "step", "targets", "tests"), results)
    assert text.count(NOT_MEASURED) == 4


def test_an_unknown_marker_is_an_error(results: Path) -> None:
    with pytest.raises(report.UnknownTable, match="'kernel'; known: targets, kernels"):
        report.filled(_readme("kernel"), results)


def test_the_check_notices_a_stale_readme_and_a_stale_picture(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(_readme("kernels"))
    for path, drawn in report.pictures(results).items():
        path.write_text(drawn)
    assert report.outdated(readme, results) == ["README.md"]
    readme.write_text(report.filled(readme.read_text(), results))
    assert report.outdated(readme, results) == []
    assert "![kernels on nvidia-h200](benchmarks/results/nvidia-h200/kernels.svg)" in readme.read_text()
    (results / "nvidia-h200" / "step.svg").write_text("<svg/>")
    assert report.outdated(readme, results) == ["step.svg"]


def test_pictures_show_every_arm(results: Path) -> None:
    drawn = {path.name: text for path, text in report.pictures(results).items()}
    assert set(drawn) == {"kernels.svg", "step.svg", "parity.svg"}
    for text in drawn.values():
        ElementTree.fromstring(text)
    assert "adaln backward" in drawn["kernels.svg"] and "compile + graphs" in drawn["step.svg"] and "vit: loss" in drawn["parity.svg"]


def test_the_readme_shows_the_committed_results() -> None:
    assert report.outdated() == [], "run: python -m benchmarks.report"
