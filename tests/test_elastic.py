"""A run goes on at another world size and ZeRO stage, in mid-epoch, as if nothing had changed: a small part of `benchmarks.elastic`."""

from pathlib import Path

from benchmarks.elastic import Segment, compare, follow, order_of, orders_agree, run_config
from tests.ranks import run_ranks
from tests.runs import merged, trace

CHAIN = [Segment(2, 3, 4), Segment(1, 2, 4), Segment(4, 1, 4), Segment(2, 3, 3)]


def test_two_one_four_two_ranks_draw_what_one_rank_draws(tmp_path: Path, digits: Path):
    steps = sum(segment.steps for segment in CHAIN)
    whole = merged(run_ranks(1, trace, run_config(tmp_path / "whole", digits, 1), steps))
    outcome = compare(CHAIN, follow(CHAIN, tmp_path / "chain", digits), whole)
    assert outcome.same_draws and outcome.positions == 16 * steps and outcome.epochs > 2
    assert outcome.fine, outcome.loss_difference

    lost = {n: what for n, what in whole["drawn"].items() if n != 17}
    assert not compare(CHAIN, {**whole, "drawn": lost}, whole).same_draws, "and a lost image would be seen"


def test_the_order_knows_neither_ranks_nor_threads(digits: Path):
    assert orders_agree(digits, steps=120) == 11
    order = order_of(digits, [(1, 120)], threads=0)
    assert sorted(order[:1797]) == list(range(1797)) and len(set(order[1797:])) == len(order) - 1797, "each once an epoch"
