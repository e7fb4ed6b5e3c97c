"""Progress where there is no terminal: plain lines with a rate and the time left."""

import itertools
import re
import time

import pytest

from fasttrain.data.prepare.progress import FolderProgress, speed


def test_plain_lines_tell_count_rate_and_time_left(capsys: pytest.CaptureFixture[str]):
    written = itertools.count(500, 10)
    with FolderProgress("preparing set", 10_000, lambda: next(written), line_seconds=0.02):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(re.fullmatch(r"preparing set: \d{3} of 10,000 \([\d,.]+ images/s, \d+ s left\)", line) for line in lines)


def test_nothing_is_printed_for_a_short_preparation(capsys: pytest.CaptureFixture[str]):
    with FolderProgress("preparing set", 10, lambda: 10):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rate", "told"), [(2109.4, "2,109 images/s"), (0.132, "0.13 images/s"), (0.0, "0.00 images/s")])
def test_a_slow_encoder_is_not_told_as_zero(rate: float, told: str):
    assert speed(rate) == told
