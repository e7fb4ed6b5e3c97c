"""What one of several processes meets while it samples or scores ends all of them, is told once, and leaves no traceback."""

import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fasttrain.checkpoint import newest_sound
from fasttrain.cli import main
from fasttrain.commands import evaluate
from fasttrain.engine import distributed
from fasttrain.engine.distributed import Processes
from fasttrain.engine.together import on_main, together
from fasttrain.errors import UserError
from fasttrain.evaluation.features import Pixels
from tests.commands import fasttrain
from tests.ranks import free_port, run_ranks
from tests.runs import plain_config

FAST = ("--steps", "2", "--batch", "8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "run.yaml").write_text(yaml.safe_dump(plain_config(folder / "run", digits, training={"steps": 1})))
    assert fasttrain("train", folder / "run.yaml").status == 0
    return folder / "run"


def _command(processes: Processes, arguments: list[str], port: int, cache: str, prepare: Callable[[int], None]) -> tuple[int, str]:
    """The command on this rank, in a group of its own: its status and what it told."""
    distributed.finish()
    os.environ.update(MASTER_PORT=str(port), FASTTRAIN_CACHE=cache)
    prepare(processes.rank)
    told = StringIO()
    with redirect_stderr(told):
        return main(arguments), told.getvalue()


def told_once(tmp_path: Path, prepare: Callable[[int], None], *arguments: str | Path) -> str:
    """The one message of two ranks, both of which end with the status of a user's mistake."""
    given = [str(argument) for argument in arguments]
    done = run_ranks(2, _command, given, free_port(), str(tmp_path / "cache"), prepare)
    messages = [line for _, told in done for line in told.splitlines() if line.startswith("fasttrain: ")]
    assert [status for status, _ in done] == [2, 2] and len(messages) == 1, done
    return messages[0]


def _as_it_is(rank: int) -> None:
    """Nothing is prepared."""


def _nothing_is_sampled(rank: int) -> None:
    evaluate._collected = None  # type: ignore[assignment]


def _infinite_on_the_second(rank: int) -> None:
    if rank == 1:
        Pixels.__call__ = lambda self, images: np.full((len(images), 64), np.inf)  # type: ignore[method-assign]


def test_statistics_of_other_features_are_refused_before_any_rank_samples(run, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(9), sigma=np.eye(9))
    told = told_once(tmp_path, _nothing_is_sampled, "evaluate", run, "--reference", tmp_path / "s.npz", "--count", "16", *FAST)
    assert "pixels features have 64 numbers, its statistics 9" in told


def test_features_that_fail_on_one_rank(run, tmp_path, digits):
    told = told_once(tmp_path, _infinite_on_the_second, "evaluate", run, "--reference", digits, "--count", "16", *FAST)
    assert "pixels features are not finite" in told


def test_too_few_samples_for_a_score(run, tmp_path, digits):
    assert "at least 2 images" in told_once(tmp_path, _as_it_is, "evaluate", run, "--reference", digits, "--count", "1", *FAST)


@pytest.mark.parametrize("name", ["step-00000001-ema-pixels.json/in the way", "."])
def test_a_score_that_cannot_be_written(run, tmp_path, digits, name):
    out = tmp_path / "out"
    if name == ".":
        out.write_text("a file")
    else:
        (out / name).mkdir(parents=True)
    told = told_once(tmp_path, _as_it_is, "evaluate", run, "--reference", digits, "--count", "16", *FAST, "--out", out)
    assert f"--out {out}: cannot write there: " in told


@pytest.mark.parametrize("place", ["", "grid.png/in the way", "000003.png/in the way"])
def test_samples_that_cannot_be_written(run, tmp_path, place):
    """Neither at first, nor at the end, nor in between."""
    out = tmp_path / "out"
    if place:
        (out / place).mkdir(parents=True)
    else:
        out.write_text("a file")
    assert f"--out {out}: cannot write there: " in told_once(tmp_path, _as_it_is, "sample", run, "--count", "40", *FAST, "--out", out)


def _second_knows_no_newest(rank: int) -> None:
    def refuse(run_dir: Path) -> Any:
        raise AssertionError("each rank chose its own")

    import fasttrain.trained

    fasttrain.trained.newest_sound = newest_sound if rank == 0 else refuse  # type: ignore[attr-defined]


CHOOSING = {
    "sample": ("sample", "RUN", "--count", "16", *FAST),
    "consistency": ("analyse", "consistency", "RUN", "COPY", "--count", "20", *FAST),
    "gradients": ("analyse", "gradients", "RUN", "--ranges", "2", "--samples", "8"),
}


@pytest.mark.parametrize("words", CHOOSING.values(), ids=CHOOSING)
def test_rank_0_chooses_the_checkpoint_for_all(run, tmp_path, words):
    places = {"RUN": str(run), "COPY": str(tmp_path / "copy")}
    if "COPY" in words:
        shutil.copytree(run, tmp_path / "copy")
    arguments = [*(places.get(word, word) for word in words), "--out", str(tmp_path / "out")]
    done = run_ranks(2, _command, arguments, free_port(), str(tmp_path / "cache"), _second_knows_no_newest)
    assert [status for status, _ in done] == [0, 0]


def _each(processes: Processes) -> list[Any]:
    def work() -> int:
        if processes.rank == 1:
            raise UserError("the second's")
        return processes.rank

    met = []
    for attempt in (
        lambda: together(processes, work),
        lambda: on_main(processes, work),
        lambda: together(processes, lambda: processes.rank),
    ):
        try:
            met.append(attempt())
        except UserError as error:
            met.append(str(error))
    return met


def test_a_mistake_of_one_is_met_by_all():
    assert run_ranks(2, _each) == [["the second's", 0, 0], ["the second's", None, 1]]
