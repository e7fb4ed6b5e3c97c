"""Who is at fault: the rule on made-up ranks, at made-up times."""

import pytest

from fasttrain.engine.verdict import Failure, Member, Verdict, judge

LIMIT = 10.0


def _member(rank: int, **known) -> Member:
    return Member(rank, **{"heard": 100.0, "began": 100.0, "state": "alive", "number": 7, "step": 3, "what": "backward", "pid": 5, **known})


def _judge(*members: Member, now: float = 101.0, **patience: float) -> tuple[str, tuple[int, ...], int] | None:
    verdict = judge(members, now, LIMIT, patience)
    return None if verdict is None else (verdict.cause, verdict.ranks, verdict.status)


def test_all_is_well():
    assert _judge(_member(0), _member(1, number=8)) is None
    assert _judge(_member(0), _member(1, state="left", heard=0.0, began=0.0)) is None


def test_a_closed_connection_is_a_death_and_comes_before_errors():
    echo = Failure(1, "RuntimeError: Connection closed by peer", 99.0)
    assert _judge(_member(0, failure=echo), _member(1, state="died")) == ("died", (1,), 138)


def test_errors_wait_for_the_news_of_a_death():
    echo = Failure(1, "RuntimeError: Connection closed by peer", 100.5)
    assert _judge(_member(0, failure=echo), _member(1)) is None
    assert _judge(_member(0, failure=echo), _member(1), now=101.6) == ("failed", (0,), 138)


@pytest.mark.parametrize(("status", "of_the_others"), [(2, 2), (3, 3), (143, 143), (1, 138), (138, 138)])
def test_a_mistake_ends_the_others_with_its_own_status(status: int, of_the_others: int):
    assert _judge(_member(0), _member(1, failure=Failure(status, "told", 99.0))) == ("failed", (1,), of_the_others)


def test_the_first_error_is_the_one_that_counts():
    errors = [Failure(1, "the cause", 98.0), Failure(1, "its echo", 98.5)]
    assert _judge(_member(0, failure=errors[1]), _member(1, failure=errors[0])) == ("failed", (1,), 138)


def test_silence():
    assert _judge(_member(0, heard=110.0, began=110), _member(1), _member(2), now=110.5) == ("silent", (1, 2), 138)
    assert _judge(_member(0, heard=110.0, began=110), _member(1, state="expected"), now=110.5) == ("silent", (1,), 138)


def test_of_stuck_ranks_the_one_behind_is_at_fault():
    heard = {"heard": 120.0}
    assert _judge(_member(0, **heard), _member(1, number=6, what="data", **heard), now=120.0) == ("stuck", (1,), 138)


def test_who_was_heard_of_lately_but_is_silent_now_is_not_called_stuck():
    """Its last words are old: it had just begun a thing, 1 s before a limit of silence."""
    others = _member(0, heard=111.0, began=111.0, number=9)
    assert _judge(others, _member(1, heard=102.0, began=100.0), now=111.0) is None
    assert _judge(_member(0, heard=113.0, number=9), _member(1, heard=102.0, began=100.0), now=113.0) == ("silent", (1,), 138)


def test_where_none_is_behind_none_is_named():
    assert _judge(_member(0, heard=120.0), _member(1, heard=120.0), now=120.0) == ("stuck", (), 138)


def test_a_rank_that_gets_on_is_not_stuck_however_long_others_wait_for_it():
    waiting = _member(0, heard=120.0, number=9)
    assert _judge(waiting, _member(1, heard=120.0, number=6, began=119.0), now=120.0) is None


def test_patience_with_a_named_activity():
    waiting, retrying = _member(0, heard=120.0), _member(1, heard=120.0, number=6, what="data")
    assert _judge(waiting, retrying, now=120.0, data=30.0) is None
    assert _judge(waiting, retrying, now=120.0, saving=30.0) == ("stuck", (1,), 138)
    late = [_member(rank, heard=150.0, number=number, what="data") for rank, number in ((0, 7), (1, 6))]
    assert _judge(*late, now=150.0, data=30.0) == ("stuck", (1,), 138)


def test_the_lowest_survivor_and_the_way_through_json():
    verdict = judge([_member(0, state="died"), _member(1), _member(2, heard=0.0)], 101.0, LIMIT, {})
    assert verdict is not None
    assert verdict.lowest == 1
    silent = judge([_member(0, heard=0.0, machine="m"), _member(1)], 101.0, LIMIT, {})
    assert silent is not None
    assert silent.stopped == (("m", 5),)
    assert Verdict.of(silent.plain()) == silent
