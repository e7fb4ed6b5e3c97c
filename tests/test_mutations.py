"""Mutated configs and checkpoints, a small share of what `python -m benchmarks.mutations` tries: only clear errors, and nothing else."""

from pathlib import Path

from benchmarks.config_vocabulary import CANARY
from benchmarks.mutations import checkpoint_trials, config_trials
from benchmarks.trials import FAULT, Limits, Trial, run_trials


def _all_fine(trial: Trial, count: int) -> set[str]:
    verdicts = list(run_trials(trial, count, workers=1, limits=Limits()))
    faults = [verdict for verdict in verdicts if verdict.outcome == FAULT]
    assert not faults, "\n".join(f"{fault.number}: {fault.told}" for fault in faults)
    assert sorted(verdict.number for verdict in verdicts) == list(range(count))
    return {verdict.outcome for verdict in verdicts}


def test_mutated_configs_are_accepted_or_refused_by_name(tmp_path: Path):
    assert _all_fine(config_trials(tmp_path, seed=5), 40) == {"accepted", "refused"}


def test_mutated_checkpoints_are_noticed_or_are_what_was_saved(tmp_path: Path):
    outcomes = _all_fine(checkpoint_trials(tmp_path, seed=5), 60)
    assert {"fell back, told", "what was saved"} <= outcomes


def _raises(number: int, folder: Path) -> tuple[str, str]:
    if number == 1:
        raise KeyError("steps")
    return "accepted", ""


def _executes(number: int, folder: Path) -> tuple[str, str]:
    if number == 1:
        import os

        os.system(f"touch {CANARY}")
    return "accepted", ""


def _writes_outside(number: int, folder: Path) -> tuple[str, str]:
    if number == 1:
        (folder.parents[1] / f"fasttrain-{CANARY}").write_text("")
        (folder.parents[1] / f"fasttrain-{CANARY}").unlink()
    return "accepted", ""


def _grows(number: int, folder: Path) -> tuple[str, str]:
    if number == 1:
        bytearray(8 << 30)
    return "accepted", ""


def _spins(number: int, folder: Path) -> tuple[str, str]:
    while number == 1:
        pass
    return "accepted", ""


def _dies(number: int, folder: Path) -> tuple[str, str]:
    if number == 1:
        import os

        os.abort()
    return "accepted", ""


WRONG = (
    (_raises, "KeyError"),
    (_executes, "os.system"),
    (_writes_outside, "open"),
    (_grows, "MemoryError"),
    (_spins, "stuck"),
    (_dies, "the process ended with"),
)


def _one_of_each(number: int, folder: Path) -> tuple[str, str]:
    """Trial 2n + 1 goes wrong in the n-th way; those between are fine."""
    wrong, _ = WRONG[max(0, number) // 2]
    return wrong(number % 2 if number > 0 else 0, folder)


def test_a_trial_that_goes_wrong_is_a_fault_and_the_others_go_on():
    verdicts = sorted(run_trials(_one_of_each, 2 * len(WRONG), workers=1, limits=Limits(seconds=0.3)))
    assert [verdict.outcome for verdict in verdicts] == ["accepted", FAULT] * len(WRONG)
    for verdict, (_, told) in zip(verdicts[1::2], WRONG, strict=True):
        assert told in verdict.told
