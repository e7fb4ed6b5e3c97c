"""Decisions: what one rank says, all decide in the same step, one step later."""

from fasttrain.engine.agreement import Agreement, Decision
from fasttrain.engine.distributed import Processes
from tests.ranks import run_ranks

STEPS, RANKS = 6, 3


def _decisions(processes: Processes, stops: dict[tuple[int, int], int], failures: set[tuple[int, int]]) -> list[Decision]:
    agreement = Agreement(processes)
    decisions = []
    for step in range(STEPS):
        here = (processes.rank, step)
        decisions.append(agreement.reach(stops.get(here, 0), here in failures))
    return [*decisions, agreement.close(), agreement.close()]


def test_all_ranks_decide_alike_one_step_after_one_has_spoken():
    stops, failures = {(1, 2): 15, (0, 2): 2, (2, 4): 15}, {(2, 1), (0, 5)}
    everyone = run_ranks(RANKS, _decisions, stops, failures)
    expected = [Decision(), Decision(), Decision(0, True), Decision(15), Decision(), Decision(15), Decision(0, True), Decision()]
    assert everyone == [expected] * RANKS
