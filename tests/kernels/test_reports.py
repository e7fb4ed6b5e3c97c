"""The two reports that need no GPU: what they count is right, and an error beyond its budget is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels.cases import CASES
from torch import Tensor

pytest.importorskip("rich")

from benchmarks import error_report, static_report

LAYER = {"norm": "layer"}


def test_every_output_and_gradient_has_its_error(device: torch.device) -> None:
    case = replace(CASES["adaln"], sample=(2, 64))
    rows = list(error_report.measure(case, LAYER, torch.bfloat16, 2, device))
    assert [row["tensor"] for row in rows] == ["output 0", "gradient of x", "gradient of scale", "gradient of shift"]
    assert all(row["within"] and 0 < error_report.share(row) <= 1 for row in rows)


def test_an_exceeded_budget_is_told_and_ends_the_report_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CASES["adaln"]

    def slightly_wrong(x: Tensor, scale: Tensor, shift: Tensor, *, impl: str, **options: Any) -> Tensor:
        return right.reference(x, scale, shift, **options) * 1.01

    for call, status in ((slightly_wrong, 1), (lambda impl, **inputs: right.reference(**inputs), 0)):
        case = replace(right, call=call, sample=(2, 64), options=(LAYER,))
        monkeypatch.setattr(error_report, "CASES", {"adaln": case})
        assert error_report.main(["--out", str(tmp_path / "errors.json")]) == status
        assert ("exceeds its budget" in capsys.readouterr().out) is bool(status)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in the interpreter")
def test_bytes_of_rows_statistics_and_partial_sums_are_counted_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(static_report, "ARCHITECTURES", ("sm_90",))
    monkeypatch.setattr(static_report, "BATCHES", (4, 8))
    tokens, width = 256, 768
    forward, backward = static_report.directions("adaln", CASES["adaln"], LAYER, (tokens, width))
    assert forward["bytes_per_element"] == {"minimum": 4, "in_bulk": 4.0}
    assert backward["bytes_per_element"] == {"minimum": 6, "in_bulk": 6.0}
    programs = torch.Size(forward["kernels"][0]["grid"]).numel()
    # Each program reads scale and shift in bf16; each token's mean and rstd are written in fp32.
    rows = programs * 2 * width * 2 + 4 * tokens * 2 * 4
    assert forward["at_batch"]["4"]["rows_and_statistics"] == pytest.approx(rows / (4 * tokens * width), abs=2e-4)
    assert forward["at_batch"]["4"]["partial_sums"] == 0
    programs = torch.Size(backward["kernels"][0]["grid"]).numel()
    # Each program writes fp32 sums for scale and shift, which are read once.
    assert backward["at_batch"]["4"]["partial_sums"] == pytest.approx(programs * 2 * width * 4 * 2 / (4 * tokens * width), abs=2e-4)


def test_other_operations_are_kept_when_some_are_looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_report, "directions", lambda operation, *_: [{"operation": operation, "is": "new"}])
    monkeypatch.setattr(error_report, "measured", lambda operation, *_: [{"operation": operation, "is": "new"}])
    kept = [{"operation": name, "is": "old"} for name in ("adaln", "noising", "gone")]
    console = static_report.Console(quiet=True)
    expected = [{"operation": "noising", "is": "new"}, {"operation": "adaln", "is": "old"}]
    assert static_report.report(console, ["noising"], kept)["passes"] == expected
    assert error_report.report(torch.device("cpu"), console, ["noising"], kept)["rows"] == expected
