"""The clock takes what it says, and the intervals hold what they should."""

import time

import numpy as np
import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_preparation_is_not_timed_and_is_handed_over() -> None:
    seen = []

    def prepare() -> str:
        time.sleep(0.02)
        return "outputs"

    seconds = timing.Clock(CPU).series(seen.append, 3, prepare)
    assert seen == ["outputs"] * 3 and len(seconds) == 3
    assert max(seconds) < 0.02


def test_arms_take_turns() -> None:
    order: list[str] = []
    arms = {name: (lambda name=name: order.append(name), None) for name in "ab"}
    series = timing.interleaved(timing.Clock(CPU), arms, rounds=3, repeats=2)
    assert "".join(order) == "aabb" * 3
    assert [len(rounds) for rounds in series["a"]] == [2, 2, 2]


def test_spread() -> None:
    found = timing.spread(list(range(1, 102)))
    assert (found["median"], found["p10"], found["p90"], found["count"]) == (51, 11, 91, 101)
    low, high = found["interval"]
    assert 30 < low < 51 < high < 72


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    samples = generator.exponential(size=(200, 50))
    intervals = [timing.median_interval(list(sample), resamples=400) for sample in samples]
    covered = np.mean([low <= np.log(2) <= high for low, high in intervals])
    assert 0.88 <= covered <= 1.0


def test_the_ratio_and_its_interval() -> None:
    generator = np.random.default_rng(4)
    drift = 1 + 0.3 * generator.random((6, 1))  # the machine slows down for whole rounds, for both arms alike
    slow = (2.0 * drift * (1 + 0.01 * generator.standard_normal((6, 30)))).tolist()
    fast = (1.0 * drift * (1 + 0.01 * generator.standard_normal((6, 30)))).tolist()
    found = timing.ratio(slow, fast)
    low, high = found["interval"]
    assert low < 2.0 < high and high - low < 0.2
    assert abs(found["median"] - 2.0) < 0.1
    assert timing.ratio(slow, slow)["median"] == 1.0


def test_a_ratio_of_different_numbers_of_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="as many rounds, got 1 and 2"):
        timing.ratio([[1.0]], [[1.0], [1.0]])


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ValueError, match="need a CUDA device, not cpu"):
        timing.graph_series(lambda: None, timing.Clock(CPU), 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_takes_longer_the_more_it_moves() -> None:
    device = torch.device("cuda")
    small, large = (torch.empty(size, dtype=torch.uint8, device=device) for size in (2**28, 2**30))
    clock = timing.Clock(device)
    seconds = [timing.spread(clock.series(lambda t=t: t.clone(), 10))["median"] for t in (small, large)]
    assert 3 < seconds[1] / seconds[0] < 5
