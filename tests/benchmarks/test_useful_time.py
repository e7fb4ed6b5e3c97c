"""Useful time's arithmetic, on a run that never was: 100 steps of 2 s, one kill that cost 30 s and five steps."""

import pytest

from benchmarks.useful_time import TARGET, Line, Lost, enough_from, summary

STEP = 2.0


def _lines() -> list[Line]:
    """Steps 1 to 55, a pause of 30 s one second into step 56, then 51 to 100."""
    before = [Line(STEP * n, f"step {n}/100: loss") for n in range(1, 56)]
    again = STEP * 55 + 1 + 30
    return [*before, *(Line(again + STEP * (n - 50), f"step {n}/100: loss") for n in range(51, 101))]


def test_what_is_not_useful_is_accounted_for_to_the_last_second():
    lines = _lines()
    lost = Lost(step=55, resumed=50, begun=1.0, noticing=1.0, ending=2.0, launching=7.0, starting=20.0)
    found = summary(lines, [lost], 100, first=lines[0].at, end=lines[-1].at)
    assert found["step_seconds"] == STEP
    assert found["wall_seconds"] == pytest.approx(100 * STEP + 30 + 5 * STEP + 1)
    assert found["useful"] == pytest.approx(200 / 241)
    assert found["steps_redone_a_kill"] == pytest.approx(5.5)
    assert found["slower_steps_saves_and_end_seconds"] == pytest.approx(0)


def test_from_which_step_time_the_target_holds():
    seconds = enough_from(pause=30, redone=0.5, apart=100, rest=0.01)
    assert seconds is not None
    assert 100 * seconds / (100 * seconds * 1.01 + 30 + 0.5 * seconds) == pytest.approx(TARGET)
    # Five steps done again of every hundred are more than the 3 % that may be lost, however long a step is.
    assert enough_from(pause=0, redone=5, apart=100, rest=0) is None
